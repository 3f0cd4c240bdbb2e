"""Folders that others made: they choose no code, cost no more than their size, and publish nothing of this machine."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import moqa
from moqa.errors import MoqaError, printable
from moqa.format.adjustment import read_adjustment, write_adjustment
from moqa.format.manifest import MANIFEST
from moqa.format.scheme import Scheme
from moqa.generation import load_any
from moqa.models.view import open_model
from moqa.storage.artifact import checksum
from moqa.tasks.configuration import read_configuration

FORMAT1 = Path(__file__).parent / "format1"
IDS = torch.arange(5, 17)[None]


@pytest.fixture(autouse=True)
def not_for_ever():
    """A read of a pipe that nobody writes to would end the test run only after hours."""
    signal.alarm(300)
    yield
    signal.alarm(0)


@pytest.fixture
def old(tmp_path):
    """A profile, plan, checkpoint and adjustment, all of one model."""
    return shutil.copytree(FORMAT1, tmp_path / "old")


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(call, *args, **options):
    with pytest.raises(MoqaError) as caught:
        call(*args, **options)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 2000
    return text


class TestConfigurations:
    @pytest.mark.parametrize(
        ("changes", "word"),
        [
            ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
            ({"num_experts": 10**9}, "num_experts is 1000000000"),
            ({"num_local_experts": 10**4, "num_hidden_layers": 1000}, "1000 layers have 10000 experts each"),
            ({"vocab_size": 10**15}, "vocab_size is 1000000000000000"),
            ({"max_position_embeddings": 10**12}, "max_position_embeddings"),
            ({"hidden_size": 10**400}, "hidden_size of 1329 bits"),
            ({"num_experts_per_tok": 7}, "a token can go to 1 to 6 experts"),
            ({"num_experts_per_tok": -1}, "a token can go to 1 to 6 experts"),
            ({"rms_norm_eps": float("nan")}, "rms_norm_eps NaN"),
            ({"model_type": "\x1b[2Jx", "auto_map": {"AutoConfig": "x.Y"}}, r"does not run custom code"),
            ({"model_type": ["qwen3_moe"]}, "model_type"),
            ({"x": json.loads("[" * 100 + "]" * 100)}, "nested in more than 64 levels"),
        ],
    )
    def test_cost_no_more_than_a_model(self, model, changes, word):
        edit(model / "config.json", **changes)
        for opening in (read_configuration, open_model, load_any):
            assert word in refusal(opening, model)

    @pytest.mark.parametrize("raw", [b"{", b'{"a":' * 100_000, b'{"x": ' + b"9" * 100_000 + b"}", b"[]", b"\xff"])
    def test_are_json(self, model, raw):
        (model / "config.json").write_bytes(raw)
        refusal(open_model, model)

    @pytest.mark.parametrize(
        "changes",
        [
            {"attn_implementation": "kernels-community/evil"},
            {"_attn_implementation": "flash_attention_9"},
            {"experts_implementation": "evil"},
            {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}},
            {"return_dict": False, "output_attentions": True, "output_hidden_states": True},
        ],
    )
    def test_choose_no_code(self, model, changes):
        wanted = open_model(model).model(IDS).logits
        edit(model / "config.json", **changes)
        assert torch.equal(open_model(model).model(IDS).logits, wanted)
        assert torch.equal(load_any(model)[0](IDS).logits, load_any(model)[0](IDS)[0])

    def test_do_not_switch_hashes_off(self, old):
        from transformers import AutoModelForCausalLM

        from moqa.integrations.transformers import MoqaConfig

        folder = old / "checkpoint"
        manifest = json.loads((folder / MANIFEST).read_text())
        edit(folder / "config.json", quantization_config={"quant_method": "moqa", "verify": False})
        seal_config(folder, manifest)
        weights = folder / sorted(manifest["files"])[-1]
        raw = bytearray(weights.read_bytes())
        raw[-1] ^= 1
        weights.write_bytes(raw)
        assert "is corrupted" in refusal(AutoModelForCausalLM.from_pretrained, folder)
        with pytest.warns(UserWarning, match="will be overwritten with the one you passed"):  # the user may
            AutoModelForCausalLM.from_pretrained(folder, quantization_config=MoqaConfig(verify=False))

    def test_that_fit_the_tensors_and_do_not_run(self, old):
        folder = old / "checkpoint"
        edit(folder / "config.json", layer_types=["sliding_attention"] * 2, sliding_window=None)
        seal_config(folder, json.loads((folder / MANIFEST).read_text()))
        refusal(moqa.load, folder)


def seal_config(folder, manifest):
    import hashlib

    manifest["config"] = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))


READERS = {
    "profile/profile.json": lambda folder: moqa.read_profile(folder / "profile"),
    "plan.json": lambda folder: moqa.read_plan(folder / "plan.json"),
    "checkpoint/moqa.json": lambda folder: moqa.load(folder / "checkpoint"),
    "checkpoint/config.json": lambda folder: moqa.load(folder / "checkpoint"),
    "checkpoint/tokenizer.json": lambda folder: moqa.load(folder / "checkpoint"),
    "adjustment/adjustment.json": lambda folder: read_adjustment(folder / "adjustment"),
    "adjustment/adjustment.safetensors": lambda folder: read_adjustment(folder / "adjustment"),
}


class TestOtherThanFiles:
    @pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "nowhere"])
    @pytest.mark.parametrize("name", READERS)
    def test_are_refused_at_once(self, old, name, kind):
        path = old / name
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to({"device": "/dev/zero", "loop": path.name, "nowhere": "nowhere"}[kind])
        refusal(READERS[name], old)

    @pytest.mark.parametrize("name", ["profile", "data.wiki"])
    def test_in_a_profile(self, old, name):
        path = next((old / "profile").glob(f"{name.split('.')[0]}*"))
        path.unlink()
        os.mkfifo(path)
        refusal(moqa.read_profile, old / "profile")


class TestPublished:
    @pytest.fixture
    def made(self, model, texts, tmp_path):
        profiled = moqa.profile(model, [texts["wiki"]], tmp_path / "p", samples=2, context=16, self_samples=0)
        return profiled, moqa.plan(profiled, strategy="uniform", widths=(4,))

    @pytest.mark.parametrize("name", ["secret.json", "chat_template.jinja"])
    def test_no_file_from_elsewhere(self, made, model, tmp_path, name):
        (tmp_path / "secret").write_text('{"key": "s3cret"}')
        (model / name).symlink_to(tmp_path / "secret")
        found = refusal(moqa.quantize, model, made[1], tmp_path / "out", method="rtn", profile=made[0])
        assert f"{name} cannot be copied: it is a link out of its folder" in found
        assert not (tmp_path / "out").exists()

    def test_files_of_the_hubs_cache(self, made, model, tmp_path):
        blobs = tmp_path / "models--a--b" / "blobs"
        blobs.mkdir(parents=True)
        shutil.move(model / "tokenizer.json", blobs / "hash")
        (model / "tokenizer.json").symlink_to(blobs / "hash")
        out = moqa.quantize(model, made[1], tmp_path / "out", method="rtn", profile=made[0])
        assert not (out / "tokenizer.json").is_symlink()


class TestEdited:
    def test_plans_are_refused(self, made_plan):
        data = json.loads(made_plan.read_text())
        edit(made_plan, mixture={"wiki": 0.25})
        assert "was changed after it was written" in refusal(moqa.read_plan, made_plan)
        del data["checksum"]  # as moqa 0.1 wrote it
        made_plan.write_text(json.dumps(data))
        assert moqa.read_plan(made_plan).mixture == data["mixture"]

    def test_plans_without_a_checksum_are_refused_before_any_work(self, old, tiny_model, tmp_path, monkeypatch):
        plan, profiled = moqa.read_plan(old / "plan.json"), moqa.read_profile(old / "profile")
        name = next(name for name, scheme in plan.units.items() if scheme.width != 8)
        plan = plan.model_copy(update={"units": plan.units | {name: Scheme(width=8)}})
        with pytest.raises(MoqaError, match="it was edited: plan again"):
            moqa.planning.check_profile(plan, profiled)

    @pytest.mark.parametrize("name", ["profile.json", "data.wiki.safetensors", "weights.safetensors"])
    def test_profiles_are_refused(self, tiny_model, texts, tmp_path, name):
        moqa.profile(tiny_model, [texts["wiki"]], tmp_path / "p", samples=2, context=16, self_samples=0)
        path = tmp_path / "p" / name
        raw = bytearray(path.read_bytes())
        place = raw.index(b'"seed": 0') + 8 if name == RECORD else len(raw) - 1
        raw[place] ^= 1
        path.write_bytes(raw)
        assert "was changed after it was written" in refusal(moqa.read_profile, tmp_path / "p")


RECORD = "profile.json"


@pytest.fixture
def made_plan(old, tmp_path, moqa_command):
    code, _, err = moqa_command("plan", old / "profile", "--bpw", 6, "-o", tmp_path / "plan.json")
    assert code == 0, err
    return tmp_path / "plan.json"


class TestAdjustments:
    @pytest.mark.parametrize("change", ["experts", "hidden", "units", "shape", "layers"])
    def test_that_do_not_fit_are_refused(self, old, tmp_path, change):
        model, _ = moqa.load(old / "checkpoint")
        wanted = model(IDS).logits
        read = read_adjustment(old / "adjustment")
        record = read.record
        name, unit = next(
            (n, u) for n, u in moqa.open_checkpoint(old / "checkpoint").manifest.units.items() if "experts" in n
        )
        replaced = {"shape": unit.shape, "scheme": unit.scheme}
        updates = {
            "experts": {"sizes": record.sizes.model_copy(update={"experts": record.sizes.experts + 1})},
            "hidden": {"sizes": record.sizes.model_copy(update={"hidden": record.sizes.hidden + 1})},
            "units": {"units": {"model.norm": replaced}},
            "shape": {"units": {name: replaced | {"shape": unit.shape[::-1]}}},
            "layers": {"channels": [p.model_copy(update={"counts": (*p.counts, 0)}) for p in record.channels]},
        }
        changes = json.loads(json.dumps(updates[change], default=lambda part: part.model_dump()))
        made = type(record).model_validate(record.model_dump(mode="json") | changes)
        tensors = {n: torch.zeros(shape, dtype=dtype) for n, (dtype, shape) in made.shard().entries.items()}
        forged = write_adjustment(made, tensors, tmp_path / "forged", False).folder
        refusal(model.apply, forged)
        assert model.adjustments.current is None
        assert torch.equal(model(IDS).logits, wanted)


class TestTerminals:
    NASTY = "\x1b[2J\x1b]0;owned\x07[/b]\x9b31m\u202e"

    def test_see_no_escapes(self, old, moqa_command):
        path = old / "checkpoint" / MANIFEST
        manifest = json.loads(path.read_text()) | {"model": self.NASTY, "strategy": self.NASTY}
        path.write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))
        edit(old / "plan.json", strategy=self.NASTY, predicted={self.NASTY: 0.5})
        for artifact in ("checkpoint", "plan.json"):
            code, out, err = moqa_command("inspect", old / artifact)
            assert code == 0, err
            assert "x1b[2J" in out
            assert not {c for c in out + err if not c.isprintable() and c != "\n"}

    def test_see_no_escapes_in_errors(self, moqa_command, tmp_path):
        (tmp_path / "moqa.json").write_text("{}")
        code, out, err = moqa_command("inspect", tmp_path / self.NASTY)
        assert (code, out) == (2, "")
        assert err.endswith("\n")
        assert err[:-1].isprintable()

    def test_see_what_is_printable(self):
        assert printable("Wörter, 漢字 and 😀") == "Wörter, 漢字 and 😀"
        assert len(str(MoqaError("x" * 10**6))) < 2000


def test_only_one_module_prints():
    folder = Path(moqa.__file__).parent / "cli"
    assert [path.name for path in folder.glob("*.py") if "typer.echo(" in path.read_text()] == ["common.py"]
