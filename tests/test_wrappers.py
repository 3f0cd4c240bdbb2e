"""Models of text that are published with parts that see: the text is quantized, all else is kept."""

import functools
import json
from types import SimpleNamespace

import blockwise
import pytest
import torch
from families import TEXTS, VOCABULARY, WRAPPERS, random_wrapper, save, train_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import moqa
from moqa.forecast.serving import ServedModel
from moqa.format.reader import open_checkpoint
from moqa.generation import Sampling, load_any, tokens
from moqa.models.layerwise import LayerwiseModel
from moqa.models.view import open_model

CAUSAL = ("qwen3_5_moe", "llama4", "gemma4")  # with a class of text alone


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A wrapper's folder and its checkpoint at 8 bits, made when first asked for."""
    root = tmp_path_factory.mktemp("wrappers")
    tokenizer = train_tokenizer(sorted(TEXTS.glob("*.calib.txt")))
    text, novel = root / "wiki.txt", root / "novel.txt"
    whole = (TEXTS / "wiki.calib.txt").read_text(encoding="utf-8")
    text.write_text(whole[:4000], encoding="utf-8")
    novel.write_text(whole[40_000:42_000], encoding="utf-8")

    @functools.cache
    def make(name):
        folder = save(random_wrapper(name), tokenizer, root / name)
        (folder / "preprocessor_config.json").write_text('{"do_resize": true}')
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
        profile = moqa.profile(folder, {"w": text}, root / f"{name}.profile", samples=4, context=32, self_samples=0)
        plan = moqa.plan(profile, strategy="uniform", widths=(8,))
        out = moqa.quantize(folder, plan, root / f"{name}.out", method="rtn", profile=profile)
        return SimpleNamespace(folder=folder, out=out, novel=novel)

    return make


@pytest.fixture(scope="module")
def ids():
    return torch.randint(20, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


def _logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", WRAPPERS)
class TestEveryWrapper:
    def test_the_original_is_transformers_own_class(self, name, made, ids):
        ours, _ = load_any(made(name).folder)
        theirs = AutoModelForImageTextToText.from_pretrained(made(name).folder, dtype=torch.float32)
        assert type(ours) is type(theirs)
        # sums of several threads are not the same to the last bit
        torch.testing.assert_close(_logits(ours, ids), _logits(theirs, ids), rtol=1e-4, atol=1e-4)

    def test_runs_block_by_block(self, name, made, ids):
        view = open_model(made(name).folder, keep=False)
        stages = LayerwiseModel(view.model)
        with torch.no_grad():
            hidden = stages.embed(ids)
            stages.embed(ids.flip(0, 1))
            for index in range(stages.depth):
                hidden = stages.run_block(index, hidden)
            assert torch.equal(stages.head(hidden), view.model(ids).logits)
        assert {unit.role for unit in view.units.values()} >= {"expert", "attention"}

    def test_the_rest_is_kept_as_stored(self, name, made):
        original = load_file(made(name).folder / "model.safetensors")
        units = open_checkpoint(made(name).out).manifest.units
        kept = load_file(sorted(made(name).out.glob("*.safetensors"))[0])
        text = {unit.split(".layers.")[0] for unit in units}.pop()
        towers = [key for key in kept if not key.startswith((text, "lm_head", "language_model"))]
        assert any("vis" in key for key in towers)
        assert all(torch.equal(kept[key], original[key]) and kept[key].dtype == torch.bfloat16 for key in towers)
        config = json.loads((made(name).out / "config.json").read_text())
        assert {"vision_config", "text_config"} <= config.keys()
        for file in ("preprocessor_config.json", "additional_chat_templates/tool_use.jinja"):
            assert (made(name).out / file).read_bytes() == (made(name).folder / file).read_bytes()

    def test_transformers_own_class_loads_the_result(self, name, made, ids):
        ours, _ = moqa.load(made(name).out)
        theirs = AutoModelForImageTextToText.from_pretrained(made(name).out, dtype=torch.float32)
        assert type(ours) is type(theirs)
        assert torch.equal(_logits(ours, ids), _logits(theirs, ids))
        towers = [key for key in theirs.state_dict() if "vis" in key]
        assert towers
        assert all(torch.equal(theirs.state_dict()[key], ours.state_dict()[key]) for key in towers)

    def test_is_close_to_the_original(self, name, made, ids):
        ours, original = moqa.load(made(name).out)[0], load_any(made(name).folder)[0]
        true, found = (_logits(model, ids).log_softmax(-1) for model in (original, ours))
        assert float((true.exp() * (true - found)).sum(-1).mean()) < 0.02

    def test_is_evaluated_generates_and_is_forecast(self, name, made):
        result = moqa.evaluate(made(name).out, {"novel": made(name).novel}, context=32)
        assert result.distributions["novel"].perplexity > 1
        model, _ = load_any(made(name).out)
        written = list(tokens(model, [25, 30, 40], Sampling(max_tokens=4, temperature=0)))
        theirs = model.generate(torch.tensor([[25, 30, 40]]), max_new_tokens=4, do_sample=False)
        assert [token.id for token in written if token] == theirs[0, 3:].tolist()
        assert ServedModel(made(name).folder).needs(64).cache > 0


@pytest.mark.parametrize("name", CAUSAL)
def test_the_class_of_text_alone_loads_the_result(name, made, ids):
    whole, text = (
        moqa.load(made(name).out)[0],
        AutoModelForCausalLM.from_pretrained(made(name).out, dtype=torch.float32),
    )
    expected, found = (_logits(model, ids).log_softmax(-1) for model in (whole, text))
    assert float((expected.exp() * (expected - found)).sum(-1).mean()) < 1e-3


def test_an_original_in_fp8_runs(made, tmp_path, ids):
    fp8, plain = blockwise.write_pair(made("qwen3_5_moe").folder, tmp_path, "fp8", (32, 32))
    assert torch.equal(*(_logits(load_any(folder)[0], ids) for folder in (fp8, plain)))


def test_an_original_in_fp8_whose_config_names_the_text_alone_runs(made, tmp_path, ids):
    pair = blockwise.write_pair(made("qwen3_5_moe").folder, tmp_path, "fp8", (32, 32))
    for folder in pair:
        blockwise.configure(folder, architectures=["Qwen3_5MoeForCausalLM"])
    models = [load_any(folder)[0] for folder in pair]
    assert [type(model).__name__ for model in models] == ["Qwen3_5MoeForCausalLM"] * 2
    assert torch.equal(*(_logits(model, ids) for model in models))


def test_what_the_text_alone_leaves_out_is_named(made, tmp_path):
    _, plain = blockwise.write_pair(made("qwen3_5_moe").folder, tmp_path, "fp8", (32, 32))
    blockwise.configure(plain, architectures=["Qwen3_5MoeForCausalLM"])
    stored = load_file(plain / "model.safetensors")
    values = sum(tensor.numel() for name, tensor in stored.items() if name.startswith("model.visual."))
    assert open_model(plain).left_out() == {"model.visual": values}
