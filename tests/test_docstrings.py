"""The examples in docstrings, executed on the reference model.

An example finds the names of its module, and those of `names` below: the objects that its arguments are named after.
One that would take long, or that needs what a test machine lacks (a GPU, a cluster, the Hub), says so behind its first
line: `# doctest: +SKIP`.
"""

import doctest
import importlib
import inspect
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import moqa
from moqa.data import read_distribution
from moqa.execution import Workspace
from moqa.format.reader import open_checkpoint
from moqa.models.layerwise import LayerwiseModel
from moqa.models.view import open_model
from moqa.progress import quiet
from moqa.storage.resumable import resumable

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "moqa"
# compiled when they are used, on a machine with a GPU
NOT_IMPORTED = {"moqa.kernels.triton_ops", "moqa.kernels.triton_weights", "moqa.__main__"}
# classes of vLLM, which has an environment of its own
NOT_IMPORTED |= {f"moqa.integrations.vllm.{name}" for name in ("checkpoint", "experts", "linear", "untested")}
# share of docstrings with examples that are executed, of all that have some
LEAST = 0.6
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules() -> list[str]:
    paths = (path.relative_to(SOURCE).with_suffix("") for path in SOURCE.rglob("*.py"))
    names = (".".join(("moqa", *path.parts)).removesuffix(".__init__") for path in paths)
    return sorted(name for name in names if name not in NOT_IMPORTED)


def documented() -> list[tuple[str, str]]:
    """Module and qualified name of everything that has an example in its docstring."""
    found = []
    for name in modules():
        tree = inspect.getsource(importlib.import_module(name))
        if ">>>" in tree:
            finder = doctest.DocTestFinder(exclude_empty=True)
            found += [(name, test.name) for test in finder.find(importlib.import_module(name), name) if test.examples]
    return found


def skipped(test: doctest.DocTest) -> bool:
    return any(example.options.get(doctest.SKIP) for example in test.examples[:1])


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """A folder that looks like a user's, and what was made in it: the names that examples use."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "reference").symlink_to(ROOT / "reference")
    for name in ("wiki", "novels", "german"):
        shutil.copy(ROOT / "reference" / "text" / f"{name}.calib.txt", folder / f"{name}.txt")
        shutil.copy(ROOT / "reference" / "text" / f"{name}.test.txt", folder / f"{name}.test.txt")
    before = Path.cwd()
    os.chdir(folder)
    view = open_model("reference/model")
    profile = moqa.profile(
        "reference/model", {"wiki": "wiki.txt", "novels": "novels.txt"}, "runs/profile", samples=2, context=32,
        self_samples=1, view=view, method="rtn",
    )  # fmt: skip
    plan = moqa.plan(profile, "3bpw")
    moqa.quantize("reference/model", plan, "runs/out", method="rtn", profile=profile, view=view, cache="full")
    moqa.adjust("runs/out", {"german": "german.txt"}, "runs/german", samples=8)
    packed, tokenizer = moqa.load("runs/out")
    tokens = torch.randint(8192, (2, 16), generator=torch.Generator().manual_seed(0))
    stages = LayerwiseModel(view.model)
    with resumable(folder / "work", {}) as work:
        yield {
            "torch": torch, "np": np, "Path": Path, "moqa": moqa, "report": quiet, "folder": folder, "work": work,
            "view": view, "model": packed, "tokenizer": tokenizer, "profile": profile, "plan": plan, "tokens": tokens,
            "stages": stages, "config": view.model.config, "hidden": stages.embed(tokens),
            "wiki": read_distribution("wiki=wiki.txt"), "workspace": Workspace(view, work),
            "unit": view.units["model.layers.3.mlp.experts.7.down_proj"], "checkpoint": open_checkpoint("runs/out"),
            "matrix": packed.get_submodule("model.layers.0.self_attn.q_proj").matrix,
        }  # fmt: skip
    os.chdir(before)


@pytest.mark.parametrize(("module", "name"), documented())
def test_the_example_runs(module, name, names):
    home = importlib.import_module(module)
    test = next(t for t in doctest.DocTestFinder(exclude_empty=True).find(home, module) if t.name == name)
    if skipped(test):
        pytest.skip("not executed")
    test.globs = {**names, **vars(home), **{k: v for k, v in names.items() if k not in vars(home)}}
    said: list[str] = []
    failed, _ = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=said.append)
    assert not failed, "".join(said)


def test_most_examples_are_executed():
    found = []
    for module, name in documented():
        tests = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module), module)
        found += [not skipped(test) for test in tests if test.name == name]
    assert sum(found) / len(found) >= LEAST
