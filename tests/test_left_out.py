"""Parts of the original that its model in transformers does not have are named, never dropped without a word."""

import shutil
from pathlib import Path

import pytest
import torch
from blockwise import configure
from families import TEXTS, random_model, save, train_tokenizer
from safetensors.torch import load_file, save_file

import moqa
from moqa.errors import MoqaError
from moqa.format.reader import open_checkpoint
from moqa.generation import load_any
from moqa.models.view import open_model
from moqa.profiling import read_profile
from moqa.reports import report

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "wiki.txt"
    path.write_text((TEXTS / "wiki.calib.txt").read_text(encoding="utf-8")[:4000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root, tokenizer = tmp_path_factory.mktemp("originals"), train_tokenizer([TEXTS / "wiki.calib.txt"])
    return {
        name: save(random_model(name, **changes), tokenizer, root / name)
        for name, changes in {"glm4_moe": {"num_nextn_predict_layers": 1}, "qwen3_next": {}}.items()
    }


def with_tensors(folder: Path, out: Path, tensors: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(folder, out)
    save_file(load_file(folder / WEIGHTS) | tensors, out / WEIGHTS, metadata={"format": "pt"})
    return out


def mtp_layer(folder: Path, after: int, index: int) -> dict[str, torch.Tensor]:
    """A copy of the last layer as one of multi-token prediction."""
    old, new = f"model.layers.{after - 1}.", f"model.layers.{index}."
    layer = {k.replace(old, new): v.clone() for k, v in load_file(folder / WEIGHTS).items() if k.startswith(old)}
    return layer | {f"{new}eh_proj.weight": torch.randn(64, 128).bfloat16()}


def quantized(folder: Path, text: Path) -> Path:
    profile = moqa.profile(folder, {"w": text}, f"{folder}.profile", samples=4, context=32, self_samples=0)
    plan = moqa.plan(profile, strategy="uniform", widths=(8,))
    return moqa.quantize(folder, plan, f"{folder}.out", method="rtn", profile=profile)


def test_layers_after_the_last_that_the_config_declares(made, text, tmp_path):
    extra = mtp_layer(made["glm4_moe"], 3, 3)
    folder = with_tensors(made["glm4_moe"], tmp_path / "mtp", extra)
    values = sum(tensor.numel() for tensor in extra.values())
    out = quantized(folder, text)
    assert open_checkpoint(out).manifest.left_out == {"model.layers.3": values}
    assert read_profile(f"{folder}.profile").record.left_out == {"model.layers.3": values}
    ids = torch.tensor([[5, 77, 300, 41]])
    with torch.no_grad():
        plain, more = (load_any(path)[0](ids).logits for path in (made["glm4_moe"], folder))
    assert torch.equal(plain, more)


def test_layers_by_name_are_in_the_output_of_commands_and_the_report(made, text, tmp_path, moqa_command):
    extra = {"mtp.fc.weight": torch.randn(64, 128).bfloat16(), "mtp.norm.weight": torch.ones(64).bfloat16()}
    folder = with_tensors(made["qwen3_next"], tmp_path / "mtp", extra)
    said = "moqa: warning: transformers' model has no mtp (8,256 values): left out"
    profile, plan, out = (tmp_path / name for name in ("profile", "plan.json", "out"))
    options = ("--samples", "4", "--context", "32", "--self-samples", "0", "--no-sensitivity")
    assert said in moqa_command("profile", folder, "--data", f"w={text}", "--out", profile, *options)[2]
    assert moqa_command("plan", profile, "--strategy", "uniform", "--widths", "8", "--out", plan)[0] == 0
    assert said in moqa_command("quantize", folder, "--plan", plan, "--out", out, "--method", "rtn")[2]
    assert said in moqa_command("inspect", folder)[2]
    assert said in moqa_command("inspect", out)[2]
    page = report([profile, out], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Left out" in page


@pytest.mark.parametrize(("declared", "index"), [(0, 3), (1, 4)])
def test_layers_that_the_config_does_not_declare_are_refused(declared, index, made, tmp_path):
    folder = with_tensors(made["glm4_moe"], tmp_path / "more", mtp_layer(made["glm4_moe"], 3, index))
    configure(folder, num_nextn_predict_layers=declared)
    with pytest.raises(MoqaError, match=rf"is not what its config.json says: glm4_moe has no model\.layers\.{index}\."):
        open_model(folder)
    with pytest.raises(MoqaError, match=rf"is not what its config.json says: glm4_moe has no model\.layers\.{index}\."):
        load_any(folder)


def test_a_checkpoint_of_a_whole_model_says_nothing(made, text, tmp_path):
    folder = with_tensors(made["qwen3_next"], tmp_path / "whole", {})
    out = quantized(folder, text)
    assert "left_out" not in (out / "moqa.json").read_text()
