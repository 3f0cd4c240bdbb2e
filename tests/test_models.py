"""Folders that are no sound models: each is refused in one line that names what was given and what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from moqa.errors import MoqaError
from moqa.models.building import empty_model
from moqa.models.view import ModelView, narrowest, open_model
from moqa.originals import folder as original
from moqa.tasks.causal_lm import load_tokenizer

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    """A copy of a sound model, to be broken."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def configure(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def shard(folder: Path) -> dict[str, str]:
    """Store the weights in two files with an index, as large checkpoints are; returns the index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    index = {name: f"model-0000{1 + (number % 2)}-of-00002.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(index.values()):
        part = {name: tensors[name] for name in index if index[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    write_index(folder, index)
    return index


def write_index(folder: Path, index: object) -> None:
    (folder / original.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def refusal(model: str | Path) -> str:
    with pytest.raises(MoqaError) as caught:
        open_model(model)
    message = str(caught.value)
    assert "\n" not in message
    assert str(model) in message
    return message.replace(str(model), "MODEL")


class TestFolders:
    @pytest.mark.parametrize("typed", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
    def test_missing(self, typed):
        remedy = "give a folder with config.json and safetensors, or a Hub id (org/name or org/name@revision)"
        assert refusal(typed) == f"no model at MODEL: {remedy}"

    def test_not_on_the_hub(self):
        assert refusal("nobody/nothing").startswith("no folder MODEL, and it cannot be downloaded from the Hub: ")

    def test_no_name(self):
        with pytest.raises(MoqaError, match="the model's name is empty"):
            open_model(" ")

    def test_a_file(self, folder):
        assert refusal(folder / WEIGHTS).startswith("no model at MODEL")

    def test_without_a_configuration(self, folder):
        (folder / "config.json").unlink()
        assert refusal(folder) == "MODEL is a folder without config.json: give the folder of a transformers checkpoint"

    def test_without_weights(self, folder):
        (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
        assert refusal(folder).startswith("MODEL holds neither model.safetensors nor model.safetensors.index.json")

    def test_a_checkpoint_of_moqa(self, folder):
        (folder / "moqa.json").write_text("{}")
        assert refusal(folder) == "MODEL is already a moqa checkpoint: give the original model"

    def test_without_a_tokenizer(self, folder):
        (folder / "tokenizer.json").unlink()
        with pytest.raises(MoqaError, match="model has no tokenizer that transformers can read"):
            load_tokenizer(folder)


class TestConfigurations:
    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "nonsense"}'])
    def test_unreadable(self, folder, text):
        (folder / "config.json").write_text(text)
        assert refusal(folder).startswith("MODEL has a config.json that transformers cannot read: ")

    def test_of_another_kind_of_model(self, folder):
        (folder / "config.json").write_text('{"model_type": "t5"}')
        works_on = "policy models, causal language models and image classifiers of transformers"
        assert refusal(folder) == f"MODEL is a t5: moqa works on {works_on}"

    def test_wrong_type(self, folder):
        configure(folder, hidden_size="wide")
        assert "hidden_size" in refusal(folder)

    def test_unknown_activation(self, folder):
        configure(folder, hidden_act="nonsense")
        assert refusal(folder) == "MODEL cannot be loaded as qwen3_moe: KeyError 'nonsense'"

    @pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
    def test_quantized_already(self, folder, method):
        configure(folder, quantization_config={"quant_method": method})
        assert (
            refusal(folder) == f"MODEL is already quantized ({method}): give the original: 16 or 32 bits, fp8 or mxfp4"
        )


class TestModelsWithoutMemory:
    def test_one_tensor_may_be_larger_than_all_memory(self):
        sides = {"hidden_size": 8192, "moe_intermediate_size": 8192, "num_experts": 4096, "num_hidden_layers": 1}
        model = empty_model(AutoConfig.for_model("qwen3_moe", **sides, vocab_size=512), torch.float32)
        assert model.model.layers[0].mlp.experts.gate_up_proj.nbytes == 2**41
        assert all(parameter.is_meta for parameter in model.parameters())
        assert not any(buffer.is_meta for buffer in model.buffers())
        assert len(ModelView(model).units) == 4096 * 3 + 4


class TestWeights:
    def test_truncated(self, folder):
        size = (folder / WEIGHTS).stat().st_size
        with (folder / WEIGHTS).open("r+b") as file:
            file.truncate(size - 10)
        assert refusal(folder) == (
            f"MODEL/{WEIGHTS} is truncated or padded: {size - 10} bytes, its header describes {size}"
        )

    @pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 8, b"\x10" + b"\0" * 7 + b"x" * 64])
    def test_not_safetensors(self, folder, content):
        (folder / WEIGHTS).write_bytes(content)
        assert refusal(folder).startswith(f"MODEL/{WEIGHTS} ")

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_not_finite(self, folder, bad):
        change(folder, lambda tensors: tensors[UP][0, :3].fill_(bad))
        assert refusal(folder) == f"MODEL: tensor {UP} has 3 NaN or infinite values of {40 * 72}"

    @pytest.mark.parametrize("name", [UP, "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
    def test_missing(self, folder, name, capfd):
        change(folder, lambda tensors: tensors.pop(name))
        message = refusal(folder)
        assert f"it lacks {name} [" in message
        assert capfd.readouterr().err == ""

    def test_missing_expert(self, folder):
        names = [f"model.layers.1.mlp.experts.5.{projection}_proj.weight" for projection in ("down", "gate", "up")]
        change(folder, lambda tensors: [tensors.pop(name) for name in names])
        expected = f"MODEL is not what its config.json says: it lacks {names[0]} [72, 40], and 2 more like it"
        assert refusal(folder) == expected

    def test_unknown(self, folder):
        change(folder, lambda tensors: tensors.update({"model.layers.1.extra.weight": torch.ones(3)}))
        expected = "MODEL is not what its config.json says: qwen3_moe has no model.layers.1.extra.weight [3]"
        assert refusal(folder) == expected

    def test_more_layers_than_configured(self, folder):
        configure(folder, num_hidden_layers=1, layer_types=None)
        assert "qwen3_moe has no model.layers.1." in refusal(folder)

    @pytest.mark.parametrize("name", [UP, "model.norm.weight"])
    def test_wrong_shape(self, folder, name):
        change(folder, lambda tensors: tensors.update({name: tensors[name][:3].clone()}))
        assert refusal(folder).startswith(f"MODEL is not what its config.json says: {name} is [3")


class TestShards:
    def test_sound(self, folder, tiny_model):
        shard(folder)
        stored, whole = dict(original.tensors(folder)), dict(original.tensors(tiny_model))
        assert stored.keys() == whole.keys()
        view, other = open_model(folder), open_model(tiny_model)
        for unit in view.units.values():
            assert torch.equal(view.weight(unit), other.weight(other.units[unit.name]))

    def test_missing(self, folder):
        index = shard(folder)
        (folder / index[UP]).unlink()
        assert refusal(folder) == f"MODEL lacks {index[UP]}: {original.INDEX} names 2 files"

    def test_truncated(self, folder):
        index = shard(folder)
        path = folder / index[UP]
        path.write_bytes(path.read_bytes()[:-1])
        assert refusal(folder).startswith(f"MODEL/{index[UP]} is truncated or padded")

    def test_tensor_twice(self, folder):
        index = shard(folder)
        other = next(file for file in index.values() if file != index[UP])
        change_in = load_file(folder / other)
        save_file({**change_in, UP: torch.ones(40, 72)}, folder / other, metadata={"format": "pt"})
        assert refusal(folder).startswith(f"MODEL holds {UP} twice: in model-")

    def test_tensor_elsewhere(self, folder):
        index = shard(folder)
        other = next(file for file in index.values() if file != index[UP])
        write_index(folder, {**index, UP: other})
        assert refusal(folder) == f"MODEL/{other} lacks {UP}: {original.INDEX} lists it there"

    @pytest.mark.parametrize("index", [[], {"a": 3}, {"a": "../outside.safetensors"}, None])
    def test_index_is_none(self, folder, index):
        shard(folder)
        write_index(folder, index)
        assert refusal(folder).startswith(f"MODEL/{original.INDEX} is not a safetensors index: ")

    def test_another_copy_beside_the_weights_does_not_count(self, folder):
        shutil.copyfile(folder / WEIGHTS, folder / "consolidated.safetensors")
        assert [path.name for path in original.weight_files(folder)] == [WEIGHTS]
        assert open_model(folder).units


class TestKeptTensors:
    @pytest.mark.parametrize(
        ("value", "dtype"), [(1.5, torch.bfloat16), (1 + 2**-10, torch.float16), (1 + 2**-20, torch.float32)]
    )
    def test_are_stored_in_the_narrowest_dtype_that_loses_nothing(self, value, dtype):
        tensor = torch.tensor([value, 0.0])
        assert narrowest(tensor).dtype == dtype
        assert torch.equal(narrowest(tensor).float(), tensor)

    def test_integers_stay(self):
        assert narrowest(torch.tensor([3])).dtype == torch.int64
