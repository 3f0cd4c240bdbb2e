"""Format 1 stays readable for ever: files that version 0.1.0 wrote are kept in tests/format1.

They are a checkpoint of a tiny random qwen3_moe model with a whole cache, an adjustment of it, and the profile and plan
that it was made from. `logits.json` holds what 0.1.0 computed with them.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import moqa
from moqa.format.cache import open_cache
from moqa.format.routing import read_routing

OLD = Path(__file__).parent / "format1"


@pytest.fixture(scope="module")
def logits():
    return json.loads((OLD / "logits.json").read_text())


def test_the_checkpoint_is_sound():
    checkpoint = moqa.open_checkpoint(OLD / "checkpoint")
    assert (checkpoint.manifest.format, checkpoint.manifest.strategy) == (1, "moqa-budget")
    assert open_cache(OLD / "checkpoint", checkpoint.manifest.fingerprint).whole
    assert read_routing(OLD / "checkpoint", checkpoint.manifest.fingerprint).top_k == 2


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_it_computes_what_it_computed(kernels, logits):
    model, _ = moqa.load(OLD / "checkpoint", kernels=kernels)
    ids = torch.arange(16)[None] + 7
    bound = 1e-4 if kernels == "reference" else 0.05
    with torch.no_grad():
        for name in ("checkpoint", "adjusted"):
            found = model(ids).logits[0, -1, :12]
            torch.testing.assert_close(found, torch.tensor(logits[name]), rtol=bound, atol=bound)
            if name == "checkpoint":
                model.apply(OLD / "adjustment")


def test_a_plan_of_the_profile_is_the_plan(tmp_path):
    shutil.copytree(OLD / "profile", tmp_path / "profile")
    profile, old = moqa.read_profile(tmp_path / "profile"), moqa.read_plan(OLD / "plan.json")
    assert old.strategy == "budget"
    # what was the default then
    plan = moqa.plan(profile, "4bpw", widths=(2, 3, 4, 5, 6, 8), floors={"attention": 4}, hedge=0.3)
    assert (plan.units, plan.account, plan.mixture) == (old.units, old.account, old.mixture)
