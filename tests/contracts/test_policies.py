"""The contract of every kind of policy: parts are found, plans are exact, checkpoints compute what was planned."""

import pytest
import torch
from policies import MAKERS, demonstrations

import moqa
from moqa.errors import MoqaError
from moqa.format.reader import open_checkpoint
from moqa.format.tiles import KEEP_WIDTH
from moqa.models.load import read_config
from moqa.models.view import open_model
from moqa.policies.adapter import PARTS
from moqa.policies.members import ADAPTERS, adapter_of
from moqa.runtime.verify import verify
from moqa.vla import plan_policy, profile_policy, quantize_policy
from moqa.vla.shifts import SHIFTS, ShiftComparison

# other noise for each observation of a batch, and the same each time
BEGINNING_WITH_NOISE = ("lerobot diffusion", "lerobot smolvla")


def test_every_kind_is_tested():
    assert {adapter.name for adapter in ADAPTERS} == {name.split()[0] for name in MAKERS}


@pytest.fixture(scope="module", params=MAKERS)
def policy(request, tmp_path_factory):
    """Folder, profile, and name of a kind."""
    base = tmp_path_factory.mktemp(request.param)
    folder = MAKERS[request.param](base / "policy")
    config = read_config(folder)
    channels, _, size = adapter_of(config).fields(config).image
    source = f"demos={demonstrations(base / 'demonstrations', size=size, channels=channels)}"
    return folder, profile_policy(folder, source, base / "profile", samples=6), request.param


class TestEveryPolicy:
    def test_its_blocks_belong_to_the_parts(self, policy):
        folder, profile, name = policy
        view = open_model(folder)
        assert adapter_of(view.model.config).name == name.split()[0]
        assert [unit.role for unit in view.units.values()] == sorted(
            (unit.role for unit in view.units.values()), key=PARTS.index
        )
        without = {"language"} if name == "lerobot diffusion" else set()
        assert {unit.role for unit in profile.record.units} == set(PARTS) - without

    def test_it_acts(self, policy):
        view = open_model(policy[0])
        chunk, size = adapter_of(view.model.config).actions(view.model.config)
        with torch.no_grad():
            actions, again = (view.task.call(view.model, view.task.probe(view.model).expand(3, -1)) for _ in range(2))
        assert actions.shape == (3, chunk, size)
        assert torch.equal(actions, again)
        if policy[2] not in BEGINNING_WITH_NOISE:
            torch.testing.assert_close(actions[0], actions[2], atol=1e-4, rtol=0)

    def test_each_shift_is_measured_for_each_unit_and_falls_with_the_width(self, policy):
        _, profile, name = policy
        tables = profile.statistics["demos"]
        for shift in SHIFTS:
            table = tables[f"shift.{shift}"]
            assert table.shape == (len(profile.record.units), len(profile.record.widths))
            assert bool((table.diff() <= 0).all())
            assert float(table[:, 0].sum()) > 0
        # lerobot's policies act without gradients
        assert bool((tables["gradient.parts"] > 0).all()) == (not name.startswith("lerobot"))

    def test_language_does_not_move_what_comes_before_it(self, policy):
        _, profile, _ = policy
        after = torch.tensor([unit.role in ("language", "action") for unit in profile.record.units])
        moved = profile.statistics["demos"]["shift.module"]
        assert float(moved[after].abs().max()) < 1e-6 < float(moved[~after].max())

    @pytest.mark.parametrize("by", ["aligned", "output-error", "random", "uniform"])
    def test_a_plan_never_exceeds_its_budget(self, policy, by):
        plan = plan_policy(policy[1], "4bpw", by=by)
        assert plan.account.bits_per_weight <= 4
        assert plan.units.keys() == {unit.name for unit in policy[1].record.units}

    def test_a_checkpoint_computes_what_was_planned(self, policy, tmp_path):
        folder, profile, _ = policy
        plan = plan_policy(profile, "4bpw", floors={"projector": KEEP_WIDTH})
        out = quantize_policy(folder, plan, tmp_path / "out", method="rtn", profile=profile)
        files = open_checkpoint(out).manifest.files
        assert not verify(out).faults
        assert sum((out / file).stat().st_size for file in files) == plan.account.checkpoint
        packed, view = moqa.load(out)[0], open_model(folder)
        comparison = ShiftComparison(view, profile.samples("demos"))
        found, wanted = comparison.against(packed), comparison.shifts(plan.units)
        # kernels add up in another order, and 8-bit activations are close
        for shift in ("module", "token"):
            assert found[shift] == pytest.approx(wanted[shift], rel=0.25, abs=1e-4)

    def test_gptq_fits_observations_better_than_rounding(self, policy, tmp_path):
        folder, profile, _ = policy
        plan = plan_policy(profile, None, by="uniform", widths=[3])
        shifts = {}
        for method in ("rtn", "gptq"):
            out = quantize_policy(folder, plan, tmp_path / method, method=method, profile=profile)
            comparison = ShiftComparison(open_model(folder), profile.samples("demos"))
            shifts[method] = comparison.against(moqa.load(out, verify=False)[0])["layer"]
        assert shifts["gptq"] < shifts["rtn"]

    def test_commands_for_other_models_refuse_it(self, policy, tmp_path):
        with pytest.raises(MoqaError, match="moqa vla profile measures it"):
            moqa.profile(policy[0], {"demos": "x"}, tmp_path / "p")
        with pytest.raises(MoqaError, match="moqa vla rollout shows what it does"):
            moqa.evaluate(policy[0], {"demos": "x"})
