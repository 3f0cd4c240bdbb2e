"""A fingerprint covers all that results depend on, and nothing that they do not."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from long_work import SMALL
from safetensors.torch import load_file, save_file

import moqa
from moqa.data import Distribution
from moqa.errors import MoqaError
from moqa.originals import fingerprint as module
from moqa.originals.fingerprint import differing_part, file_times, fingerprint
from moqa.originals.folder import read_header
from moqa.planning import plan
from moqa.profiling import profile, read_profile
from moqa.profiling.store import RECORD
from moqa.quantization import quantize

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture
def folder(tiny_model, tmp_path):
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def rewrite(folder, file="config.json", **values):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def flip(folder):
    """Flip one bit of a value that is not among the first of its tensor, and leave length and times as they are."""
    path = folder / WEIGHTS
    content, before = bytearray(path.read_bytes()), path.stat()
    begin, end = read_header(path)[UP]["data_offsets"]
    assert end - begin > 4096
    content[8 + int.from_bytes(content[:8], "little") + end - 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "top k": (lambda f: rewrite(f, num_experts_per_tok=1), "configuration values"),
    "angles": (
        lambda f: rewrite(f, rope_parameters={"rope_type": "default", "rope_theta": 500.0}), "configuration values",
    ),
    "activation": (lambda f: rewrite(f, hidden_act="gelu"), "configuration values"),
    "normalization": (lambda f: rewrite(f, norm_topk_prob=False), "configuration values"),
    "vocabulary": (
        lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text() + "\n"), "tokenizer files",
    ),
    "special tokens": (lambda f: rewrite(f, "tokenizer_config.json", add_bos_token=True), "tokenizer files"),
    "one bit": (flip, "weights"),
    "first values": (
        lambda f: save_file({**load_file(f / WEIGHTS), UP: torch.zeros(40, 72).bfloat16()}, f / WEIGHTS), "tensors",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tiny_model, texts, tmp_path_factory):
    """A folder with a model and all that was made from it: profile, plan and checkpoint."""
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_model, root / "model")
    measured = profile(root / "model", [texts["wiki"]], root / "p", **SMALL)
    chosen = plan(measured, strategy="uniform", widths=(8,))
    quantize(root / "model", chosen, root / "out", method="rtn")
    return root, chosen


@pytest.fixture
def changed(made, tiny_model):
    """The same; the model may be changed."""
    yield made
    shutil.copytree(tiny_model, made[0] / "model", dirs_exist_ok=True)


@pytest.mark.parametrize("change", CHANGES)
def test_another_original_is_refused_by_all_that_was_made_from_the_first(changed, change, texts, tmp_path):
    (root, chosen), (edit, part) = changed, CHANGES[change]
    folder, out, before = root / "model", root / "out", fingerprint(root / "model")
    assert differing_part(folder, before) is None
    edit(folder)
    assert fingerprint(folder) != before
    assert differing_part(folder, before) == part
    said = []
    for again in (
        lambda: profile(folder, [texts["wiki"]], root / "p", **SMALL),
        lambda: quantize(folder, chosen, tmp_path / "again", method="rtn"),
        lambda: moqa.evaluate(out, [texts["novels"]], against=folder, context=32, windows=1),
    ):
        with pytest.raises(MoqaError, match=f"other {part}") as caught:
            again()
        said.append(str(caught.value))
    assert said[0].startswith(f"{root / 'p'} is the profile of ../model, another model")
    assert said[1].startswith(f"the plan is for model (qwen3_moe): {folder} is another model")
    assert said[2].startswith(f"--against {folder} is not the model that {out} was made from")
    assert not any("\n" in message for message in said)
    assert list(tmp_path.iterdir()) == []
    assert sorted(path.name for path in root.iterdir()) == ["model", "out", "p"]


class TestTheSameOriginal:
    def test_however_its_json_files_are_written(self, folder):
        before = fingerprint(folder)
        path = folder / "config.json"
        values = json.loads(path.read_text())
        for name in ("rms_norm_eps", "hidden_size"):
            values[name] = float(values[name])
        values["torch_dtype"] = values.pop("dtype")
        values |= {"transformers_version": "9.9.9", "_name_or_path": "elsewhere"}
        path.write_text(json.dumps(dict(reversed(values.items())), indent=7))
        rewrite(folder, "tokenizer_config.json", chat_template="{{ messages }}")
        (folder / "README.md").write_text("more")
        (folder / "results.json").write_text("{}")
        assert fingerprint(folder) == before

    def test_a_copy(self, folder, tiny_model):
        assert fingerprint(folder) == fingerprint(tiny_model)

    def test_unchanged_files_are_hashed_once(self, folder, monkeypatch):
        hashed = []
        monkeypatch.setattr(module, "_hash_piece", lambda place: hashed.append(place) or b"")
        monkeypatch.setattr(module, "_RECENT", -1e9)  # as if the files were old
        assert fingerprint(folder) == fingerprint(folder)
        assert len(hashed) == 1
        monkeypatch.setattr(module, "_RECENT", 2)  # a file this young may change without its time changing
        fingerprint(folder)
        assert len(hashed) == 2

    def test_files_with_the_same_times_are_not_read_again(self, folder, monkeypatch):
        before, times = fingerprint(folder), file_times(folder)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_hash_piece", None)
            assert differing_part(folder, before, times) is None
        flip(folder)
        os.utime(folder / WEIGHTS)
        assert differing_part(folder, before, times) == "weights"

    def test_a_cheap_difference_is_found_without_reading_everything(self, folder, monkeypatch):
        before = fingerprint(folder)
        rewrite(folder, num_experts_per_tok=1)
        monkeypatch.setattr(module, "_hash_piece", None)
        assert differing_part(folder, before) == "configuration values"


class TestOlderFingerprints:
    """Those of moqa 0.1 cover the tensors' names, dtypes, shapes and first bytes, and are checked so."""

    @pytest.fixture
    def old(self, folder, texts, tmp_path):
        """A profile as moqa 0.1 recorded it."""
        measured = profile(folder, [texts["wiki"]], tmp_path / "p", **SMALL)
        values = json.loads((tmp_path / "p" / RECORD).read_text())
        values["fingerprint"] = module._tensors(folder)
        del values["checksum"]
        (tmp_path / "p" / RECORD).write_text(json.dumps(values))
        assert len(values["fingerprint"]) == 64
        return read_profile(measured.folder)

    def test_still_serve(self, folder, old, texts, tmp_path):
        out = quantize(folder, plan(old, strategy="uniform", widths=(8,)), tmp_path / "out", method="rtn")
        assert moqa.open_checkpoint(out).manifest.fingerprint == old.record.fingerprint
        assert moqa.evaluate(out, [texts["novels"]], against=folder, context=32, windows=1).distributions
        more = profile(folder, [texts["wiki"], texts["novels"]], old.folder, **SMALL)
        assert set(more.names) == {"novels", "wiki"}
        assert more.record.fingerprint == old.record.fingerprint

    def test_still_refuse(self, folder, old, texts):
        CHANGES["first values"][0](folder)
        with pytest.raises(MoqaError, match=r"another model: .* has other tensors"):
            profile(folder, [texts["wiki"]], old.folder, **SMALL)


class TestUnfinishedWork:
    def test_of_another_original_is_not_continued(self, folder, texts, tmp_path):
        def stop(step, *_, **__):
            if step == "sensitivity":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            profile(folder, [texts["wiki"]], tmp_path / "p", **SMALL, report=stop)
        flip(folder)
        with pytest.raises(MoqaError, match="unfinished run with model"):
            profile(folder, [texts["wiki"]], tmp_path / "p", **SMALL)


class TestSamples:
    def test_a_profile_with_other_samples_is_not_the_plans(self, made, texts, tmp_path):
        folder, chosen = made[0] / "model", made[1]
        other = profile(folder, [Distribution("wiki", texts["novels"].texts, "x")], tmp_path / "q", **SMALL)
        with pytest.raises(MoqaError, match="q has other samples than the plan: plan again from this profile"):
            quantize(folder, chosen, tmp_path / "out", profile=other)
