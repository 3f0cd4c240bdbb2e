"""Several threads that load models at once, while others build their own."""

import copy
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from logging import StreamHandler

import pytest
import torch
from families import FAMILIES, random_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import build_glob_alternation
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeModel
from transformers.utils import logging

import moqa
from moqa.generation import load_any
from moqa.models.building import empty_model
from moqa.models.view import open_model
from moqa.planning import plan
from moqa.profiling import profile
from moqa.quantization import quantize

IDS = torch.arange(5, 25)[None]
TIMES = 5


@pytest.fixture(scope="module")
def loaders(tiny_model, texts, tmp_path_factory):
    """By name, ways to load: checkpoints of two widths in two dtypes, and the original, whole and layer by layer."""
    folder = tmp_path_factory.mktemp("threads")
    measured = profile(tiny_model, [texts["wiki"]], folder / "profile", samples=2, context=32, self_samples=0)
    out = {
        width: quantize(
            tiny_model, plan(measured, strategy="uniform", widths=(width,)), folder / str(width), method="rtn"
        )
        for width in (2, 4)
    }
    return {
        "2 bits": lambda: moqa.load(out[2])[0],
        "4 bits": lambda: moqa.load(out[4], dtype=torch.bfloat16)[0],
        "original": lambda: load_any(tiny_model)[0],
        "in layers": lambda: open_model(tiny_model, keep=False).model,
    }


@torch.inference_mode()
def described(model):
    """All that a model computes from, and what it computes."""
    kept = {n: (t.dtype, t.clone()) for n, t in [*model.named_parameters(), *model.named_buffers()] if not t.is_meta}
    return kept, model(IDS).logits


def same(found, wanted):
    (kept, logits), (wanted_kept, wanted_logits) = found, wanted
    return (
        kept.keys() == wanted_kept.keys()
        and all(kept[n][0] == wanted_kept[n][0] and torch.equal(kept[n][1], wanted_kept[n][1]) for n in kept)
        and torch.equal(logits, wanted_logits)
    )


@pytest.mark.parametrize("pair", [("2 bits", "4 bits"), ("4 bits", "original"), ("2 bits", "in layers")], ids="-".join)
def test_two_threads_load_what_one_loads(loaders, pair):
    wanted = {name: described(loaders[name]()) for name in pair}
    verbosity, dtype = logging.get_verbosity(), torch.get_default_dtype()
    start = threading.Barrier(2)

    def load(name):
        found = []
        for _ in range(TIMES):
            start.wait(60)
            found.append(loaders[name]())
        return found

    with ThreadPoolExecutor(2) as pool:
        for name, models in zip(pair, pool.map(load, pair), strict=True):
            assert all(same(described(model), wanted[name]) for model in models), name
    assert (logging.get_verbosity(), torch.get_default_dtype()) == (verbosity, dtype)


def test_others_build_their_own_modules_meanwhile(loaders):
    done = threading.Event()

    def build():
        found = []
        while not done.is_set():
            found.append(nn.Linear(3, 3).weight)
        return found

    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(build)
        for _ in range(TIMES):
            loaders["2 bits"]()
        done.set()
        weights = building.result()
    assert weights
    assert all(weight.device.type == "cpu" and weight.requires_grad for weight in weights)


def test_others_see_nothing_of_a_model_being_built(loaders, monkeypatch):
    inside, seen, real = threading.Event(), threading.Event(), Qwen3MoeModel.__init__
    builder = []

    def wait(self, config):
        builder.append(threading.current_thread())
        inside.set()
        assert seen.wait(120)
        real(self, config)

    register, level, heard = nn.Module.register_parameter, logging.get_verbosity(), []
    handler = StreamHandler()
    handler.emit = heard.append
    with ThreadPoolExecutor(1) as pool, monkeypatch.context() as patch:
        patch.setattr(Qwen3MoeModel, "__init__", wait)
        loading = pool.submit(loaders["4 bits"])  # in bfloat16
        assert inside.wait(120)
        own = nn.Linear(3, 3)
        assert (own.weight.dtype, own.weight.device.type, torch.tensor(0.5).dtype) == (
            torch.float32,
            "cpu",
            torch.float32,
        )
        assert torch.get_default_dtype() == torch.float32
        assert nn.Module.register_parameter is register
        assert logging.get_verbosity() == level
        logging.add_handler(handler)
        logging.get_logger("transformers.test").warning("heard")
        logging.remove_handler(handler)
        seen.set()
        assert loading.result().dtype == torch.bfloat16
    assert [record.getMessage() for record in heard] == ["heard"]
    assert builder[0] is not threading.current_thread()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_model_is_what_transformers_builds(family):
    config = random_model(family).config
    theirs = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16)
    ours = empty_model(config, torch.bfloat16)
    # but for what `from_pretrained` keeps in float32, whatever the dtype
    kept = list(theirs._get_dtype_plan(torch.bfloat16))
    wide = build_glob_alternation(kept)[0] if kept else re.compile("(?!)")

    def dtype_of(name, tensor):
        return torch.float32 if tensor.is_floating_point() and wide.search(name) else tensor.dtype

    assert {n: (p.dtype, p.shape) for n, p in ours.named_parameters()} == {
        n: (dtype_of(n, p), p.shape) for n, p in theirs.named_parameters()
    }
    for (name, found), (other, wanted) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(found.to(wanted.dtype), wanted), name
        assert found.dtype == (dtype_of(name, wanted) if name in theirs.state_dict() else wanted.dtype), name
    assert (ours.config.dtype, ours.dtype) == (torch.bfloat16, torch.bfloat16)
