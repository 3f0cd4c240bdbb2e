"""SECURITY.md, held to: nothing that lies in a folder is executed."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from moqa.errors import MoqaError
from moqa.format.manifest import MANIFEST
from moqa.format.reader import open_checkpoint
from moqa.format.writer import write_manifest
from moqa.generation.load import load_any
from moqa.models.load import read_config
from moqa.models.view import open_model
from moqa.runtime.load import load
from moqa.tasks.causal_lm import load_tokenizer

SOURCE = Path(__file__).parents[1] / "src" / "moqa"
CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import PretrainedConfig, PreTrainedTokenizerFast
class Config(PretrainedConfig):
    model_type = "own"
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def mark(tmp_path):
    """A file that is there once a folder's code has run."""
    return tmp_path / "ran"


@pytest.fixture
def hostile(tiny_model, tmp_path, mark, monkeypatch):
    """A model that brings its own code, before a user who agrees to everything."""
    folder = shutil.copytree(tiny_model, tmp_path / "hostile")
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return folder


def give_code(folder, file, **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("opening", [read_config, open_model, load_any])
def test_a_configurations_code_is_not_run(hostile, mark, opening):
    give_code(hostile, "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"})
    with pytest.raises(MoqaError, match="custom code"):
        opening(hostile)
    assert not mark.exists()


def test_a_checkpoints_code_is_not_run(checkpoint, mark, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (checkpoint / "own.py").write_text(CODE.format(mark=str(mark)))
    manifest = open_checkpoint(checkpoint, verify=False).manifest
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}))
    write_manifest(manifest, checkpoint / MANIFEST)  # who writes code into a folder can write its hashes, too
    with pytest.raises(MoqaError, match="custom code"):
        load(checkpoint)
    assert not mark.exists()


def test_a_tokenizers_code_is_not_run(hostile, mark):
    give_code(hostile, "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"})
    auto_map = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    give_code(hostile, "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto_map)
    with contextlib.suppress(MoqaError):
        load_tokenizer(hostile)
    assert not mark.exists()


def test_known_families_are_read_by_transformers_code(hostile, mark):
    give_code(hostile, "config.json", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    assert open_model(hostile).model.config.model_type == "qwen3_moe"
    assert not mark.exists()


def test_weights_that_are_pickled_are_refused(hostile):
    (hostile / "model.safetensors").unlink()
    torch.save({}, hostile / "pytorch_model.bin")
    with pytest.raises(MoqaError, match="save the model with transformers as safetensors first"):
        open_model(hostile)


def test_no_module_unpickles():
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        for word in ("import pickle", "cloudpickle", "torch.load(", "trust_remote_code=True", "eval(", "exec("):
            assert word not in text.replace(".eval(", ""), f"{path} has {word}"
