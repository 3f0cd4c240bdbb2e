"""Models by their Hub id: what is downloaded, what can be loaded, and what a checkpoint says for the Hub."""

import json
import shutil

import huggingface_hub
import pytest
import yaml
from huggingface_hub.utils import filter_repo_objects
from long_work import SMALL

import moqa
from moqa.errors import MoqaError
from moqa.format.reader import open_checkpoint
from moqa.generation.load import load_any
from moqa.originals.folder import locate
from moqa.originals.hub import INDEX

CARD = "---\nlicense: other\nlicense_name: tiny-1.0\n---\n# Tiny\n"


def in_cache(folder, cache, name):
    """Put a folder into a Hub cache as the newest snapshot of an id."""
    home = cache / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    return shutil.copytree(folder, home / "snapshots" / ("0" * 40))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A Hub cache for this module; the Hub itself is offline."""
    cache = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        yield cache


@pytest.fixture(scope="module")
def base(cache, tiny_model):
    """An original in the cache, with a card and a licence."""
    snapshot = in_cache(tiny_model, cache, "org/tiny")
    (snapshot / "README.md").write_text(CARD)
    (snapshot / "LICENSE.md").write_text("Do as you like.\n")
    return snapshot


@pytest.fixture(scope="module")
def out(base, texts, tmp_path_factory):
    """A checkpoint with its proof, made from the id."""
    folder = tmp_path_factory.mktemp("made")
    options = moqa.CompressOptions(samples=4, context=32, self_samples=2, method="rtn")
    (folder / "wiki.txt").write_text(texts["wiki"].texts[0])
    moqa.compress("org/tiny", {"wiki": folder / "wiki.txt"}, "6bpw", folder / "out", options=options)
    return folder / "out"


class TestDownload:
    FILES = (
        "config.json", "model-1.safetensors", INDEX, "original/model.safetensors", "metal/model.bin", "tokenizer.json",
        "consolidated.safetensors", "consolidated-1.safetensors", "pytorch_model.bin", "README.md", "LICENSE.txt",
        "figures/speed.png", "onnx/config.json",
    )  # fmt: skip

    @pytest.fixture
    def asked(self, monkeypatch, tmp_path):
        """Options of each download; the first writes an index that names a file with an unusual name."""
        calls = []

        def download(name, **options):
            calls.append({"name": name, **options})
            (tmp_path / "config.json").touch()
            (tmp_path / "model-1.safetensors").touch()
            index = {"weight_map": {"a": "model-1.safetensors", "b": "experts.safetensors", "c": "../c.safetensors"}}
            (tmp_path / INDEX).write_text(json.dumps(index))
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return calls

    def test_takes_only_files_that_are_used(self, asked):
        locate("org/tiny")
        patterns = {key: asked[0][key] for key in ("allow_patterns", "ignore_patterns")}
        assert list(filter_repo_objects(self.FILES, **patterns)) == [
            "config.json", "model-1.safetensors", INDEX, "tokenizer.json", "README.md", "LICENSE.txt",
        ]  # fmt: skip

    def test_takes_files_of_other_names_if_the_index_names_them(self, asked):
        locate("org/tiny")
        assert [call["allow_patterns"] for call in asked[1:]] == [["experts.safetensors"]]

    def test_takes_a_revision(self, asked):
        locate("org/tiny@v2")
        assert {(call["name"], call["revision"]) for call in asked} == {("org/tiny", "v2")}

    @pytest.mark.parametrize("name", ["org/none", "org/tiny@none"])
    def test_says_that_there_is_none(self, cache, name):
        for find in (locate, open_checkpoint, load_any):
            with pytest.raises(MoqaError, match=f"^no folder {name}, and it cannot be downloaded from the Hub: "):
                find(name)


class TestById:
    @pytest.fixture(scope="class", autouse=True)
    def by_id(self, out, cache):
        in_cache(out, cache, "org/tiny-moqa")

    @pytest.mark.parametrize(
        "command",
        [
            ("verify", "org/tiny-moqa"), ("inspect", "org/tiny-moqa"), ("inspect", "org/tiny"),
            ("generate", "org/tiny-moqa", "The", "--max-tokens", "2"), ("report", "org/tiny-moqa", "-o", "PAGE"),
            ("evaluate", "org/tiny-moqa", "--against", "org/tiny", "--data", "TEXT", "--windows", "1"),
        ],
        ids=lambda command: "-".join(command[:2]),
    )  # fmt: skip
    def test_commands(self, moqa_command, texts, tmp_path, command):
        (tmp_path / "text.txt").write_text(texts["novels"].texts[0])
        paths = {"PAGE": tmp_path / "page.html", "TEXT": f"novels={tmp_path / 'text.txt'}"}
        code, _, err = moqa_command(*(paths.get(word, word) for word in command))
        assert code == 0, err

    def test_functions(self):
        model, _ = moqa.load("org/tiny-moqa", kernels="reference")
        assert model.config.model_type == "qwen3_moe"
        assert load_any("org/tiny")[0].config.model_type == "qwen3_moe"

    def test_adjust_finds_the_cache_of_channels(self, sharded_plan, sharded_profile, sharded, cache, tmp_path, texts):
        made = moqa.quantize(sharded, sharded_plan, tmp_path / "q", method="rtn", profile=sharded_profile, cache="full")
        in_cache(made, cache, "org/cached")
        adjusted = moqa.adjust("org/cached", [texts["novels"]], tmp_path / "adj", samples=8, budget="20%")
        assert adjusted.channels > 0


class TestWhatACheckpointSays:
    def test_the_card(self, out):
        _, front, page = (out / "README.md").read_text().split("---\n", 2)
        assert yaml.safe_load(front) == {
            "base_model": "org/tiny", "base_model_relation": "quantized", "library_name": "transformers",
            "license": "other", "license_name": "tiny-1.0", "tags": ["moqa", "quantized", "mixed-precision"],
        }  # fmt: skip
        manifest, proof = open_checkpoint(out).manifest, json.loads((out / "proof.json").read_text())
        assert "[org/tiny](https://huggingface.co/org/tiny)" in page
        assert f"$ moqa quantize org/tiny {manifest.budget} --strategy {manifest.strategy} --method rtn" in page
        assert f"| this checkpoint | {proof['ours']['bytes'] / 2**20:.2f} MiB |" in page
        assert len([line for line in page.splitlines() if line.startswith("| uniform |")]) >= 1
        assert 'moqa.load("FOLDER_OR_ID")' in page
        assert "tiny-1.0. [LICENSE.md](LICENSE.md)" in page

    def test_the_licence(self, out, base):
        assert (out / "LICENSE.md").read_bytes() == (base / "LICENSE.md").read_bytes()

    def test_the_recipe(self, out):
        recipe, manifest = json.loads((out / "config.json").read_text())["quantization_config"], open_checkpoint(out)
        assert {key: recipe[key] for key in ("quant_method", "strategy", "method", "budget", "group_sizes")} == {
            "quant_method": "moqa", "strategy": "budget", "method": "rtn", "budget": "--bpw 6",
            "group_sizes": sorted({unit.scheme.group_size for unit in manifest.manifest.units.values()}),
        }  # fmt: skip
        assert recipe["bits_per_weight"] == pytest.approx(manifest.bits_per_weight, abs=1e-3)
        assert recipe["widths"] == sorted({unit.scheme.width for unit in manifest.manifest.units.values()})

    def test_a_card_without_licence_or_base(self, sharded, sharded_plan, sharded_profile, tmp_path):
        made = moqa.quantize(sharded, sharded_plan, tmp_path / "q", method="rtn", profile=sharded_profile)
        front = yaml.safe_load((made / "README.md").read_text().split("---\n")[1])
        assert set(front) == {"library_name", "tags"}


def test_no_file_says_where_it_was_made(sharded, texts, tmp_path):
    model = shutil.copytree(sharded, tmp_path / "models" / "tiny")
    (tmp_path / "wiki.txt").write_text(texts["wiki"].texts[0])
    work = tmp_path / "runs"
    options = moqa.CompressOptions(context=SMALL["context"], samples=4, self_samples=2, method="rtn", cache="full")
    moqa.compress(model, {"wiki": tmp_path / "wiki.txt"}, "6bpw", work / "out", options=options)
    moqa.adjust(work / "out", [texts["novels"]], work / "adjusted", samples=8, budget="20%")
    moqa.report([work], work / "report.html")
    files = [path for path in work.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if bytes(tmp_path) in path.read_bytes() or b"/moqa-" in path.read_bytes()]
    # and yet the original is found
    result = moqa.evaluate(work / "out", [texts["python"]], windows=1)
    assert result.distributions["python"].kl_divergence is not None
    assert moqa.read_profile(work / "out.profile").original == str(model.resolve())
