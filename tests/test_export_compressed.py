"""compressed-tensors: the same integers and scales in words of 32 bits, which its own package decodes."""

import json
import re
from pathlib import Path

import pytest
import torch
from gguf_models import make_model
from hypothesis import given
from hypothesis import strategies as st
from long_work import contents, refusal
from safetensors.torch import load_file

import moqa
from moqa.exports.members.compressed_tensors import _words
from moqa.format.manifest import StoredUnit
from moqa.format.reader import open_checkpoint
from moqa.format.scheme import Scheme
from moqa.methods import METHODS
from moqa.originals import OriginalReader
from moqa.planning import plan
from moqa.profiling import profile


def decoded(words: torch.Tensor, scale: torch.Tensor, width: int, features: int) -> torch.Tensor:
    """[out, in] weights as the format defines them, from the lowest bits of each word on."""
    fields = (words.long()[..., None] >> (torch.arange(32 // width) * width)) & (2**width - 1)
    integers = fields.flatten(1)[:, :features] - 2 ** (width - 1)
    return integers * scale.float().repeat_interleave(features // scale.shape[1], 1)


@given(
    st.sampled_from([4, 8]), st.sampled_from([32, 64, 128]), st.integers(1, 40), st.integers(1, 4), st.integers(0, 99)
)
def test_words_are_the_weights_of_the_checkpoint_bit_for_bit(width, group, out, groups, seed):
    torch.manual_seed(seed)
    scheme, shape = Scheme(width=width, group_size=group, symmetric=True), (out, groups * group)
    stored = METHODS["rtn"].store(torch.randn(shape), scheme)
    unit = StoredUnit(layer=0, role="expert", shape=shape, scheme=scheme, method="rtn", error=None)
    words = _words(unit, stored)
    assert words["weight_packed"].dtype == torch.int32
    assert words["weight_packed"].numel() * 4 == -(-shape[1] * width // 32) * 4 * out
    assert words["weight_shape"].tolist() == [*shape]
    found = decoded(words["weight_packed"], words["weight_scale"], width, shape[1])
    assert torch.equal(found, scheme.storage.decode(scheme, shape, stored))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("ct") / "model")


@pytest.fixture(scope="module")
def measured(model, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ct") / "profile"
    return profile(model, [texts["wiki"]], folder, samples=4, context=32, self_samples=1)


@pytest.fixture(scope="module")
def symmetric(model, measured, tmp_path_factory):
    made = plan(measured, strategy="uniform", engine="vllm", widths=(4,), groups=(32,))
    return moqa.quantize(model, made, tmp_path_factory.mktemp("ct") / "out", profile=measured, method="rtn")


@pytest.fixture(scope="module")
def exported(symmetric, tmp_path_factory):
    out = tmp_path_factory.mktemp("ct") / "vllm"
    moqa.export(symmetric, out, to="compressed-tensors")
    return out


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    packed = open_checkpoint(folder)
    return {
        name: unit.scheme.storage.decode(
            unit.scheme, unit.shape, unit.scheme.among(packed.layer(unit.layer), name, unit.shape)
        )
        for name, unit in packed.manifest.units.items()
    }


def test_it_has_the_names_of_the_original(model, exported):
    index = json.loads((exported / "model.safetensors.index.json").read_text())["weight_map"]
    plain = {re.sub(r"_(packed|scale|shape)$", "", name) for name in index}
    assert plain == OriginalReader(model).headers.keys()
    for file in set(index.values()):
        assert load_file(exported / file).keys() == {name for name, place in index.items() if place == file}
    assert (exported / "tokenizer.json").is_file()
    assert not (exported / "moqa.json").exists()


def test_layers_that_differ_are_groups_of_their_own(model, measured, tmp_path):
    made = plan(measured, strategy="uniform", engine="vllm", widths=(4, 8), groups=(32,),
                fixed={"*.layers.0.mlp.*": 8, "*.layers.1.mlp.*": 4, "*.self_attn.*": 4})  # fmt: skip
    out = moqa.quantize(model, made, tmp_path / "out", profile=measured, method="rtn")
    done = moqa.export(out, tmp_path / "ct", to="compressed-tensors")
    assert "layers differ in width or group" in done.remarks[0]
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    for name, scheme in made.units.items():
        matching = [
            group["weights"]["num_bits"]
            for group in config["config_groups"].values()
            if any(re.match(target.removeprefix("re:"), name) for target in group["targets"])
        ]
        assert matching == [scheme.width], name


def test_a_second_export_replaces_the_first_if_asked(symmetric, exported, tmp_path):
    assert "exists" in refusal(lambda: moqa.export(symmetric, exported, to="compressed-tensors"))
    before = contents(exported)
    moqa.export(symmetric, exported, to="compressed-tensors", overwrite=True)
    assert contents(exported) == before


def test_zero_points_are_refused_with_the_command(made, tmp_path):
    message = refusal(lambda: moqa.export(made[0], tmp_path / "ct", to="compressed-tensors"))
    assert re.search(r"stores .* as int of 2 bits with zero-points: plan with .*--engine vllm", message)
    assert not list(tmp_path.iterdir())


def test_what_is_no_checkpoint_is_refused(tmp_path):
    message = refusal(lambda: moqa.export(str(tmp_path), tmp_path / "ct", to="compressed-tensors"))
    assert "is no checkpoint: quantize a plan of --engine vllm" in message


def test_transformers_loads_it(symmetric, exported):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    # with the warning that the options of the file are taken
    with pytest.warns(UserWarning, match="quantization_config"):
        loaded = AutoModelForCausalLM.from_pretrained(
            exported, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
        )
    state = loaded.state_dict()
    for name, weights in weights_of(symmetric).items():
        if ".experts." in name:
            path, expert, projection = name.rsplit(".", 2)
            found = state[f"{path}.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"][int(expert)]
            found = found.chunk(2)[projection == "up_proj"] if projection != "down_proj" else found
        else:
            found = state[f"{name}.weight"]
        # it multiplies in 16 bits
        assert torch.allclose(found.float(), weights, rtol=2**-7, atol=0)
