"""Several threads that load models at once, while others build their own."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers.utils import logging

import moqa
from moqa.generation import load_any
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
