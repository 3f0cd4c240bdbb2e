"""What every strategy must do, whoever adds it: keep the budget, the ties and the floor, and use what it is given."""

import functools
import json

import jsonschema
import pytest
import torch

from moqa.errors import MoqaError
from moqa.format.layout import shards
from moqa.format.scheme import Scheme
from moqa.models.units import ROLES
from moqa.planning import DEFAULT_WIDTHS, STRATEGIES, TIES, Budget, Plan, for_file, plan, read_plan
from moqa.planning.account import kept_entries
from moqa.planning.ties import tie_groups
from moqa.profiling import SELF
from moqa.storage.artifact import read_json, write_json

FLOOR = 4
FLOORS = {role: FLOOR for role in ROLES if role != "expert"}

BITS = (4.0, 4.6, 6.0, 9.0)  # the tiny profile's rows are short, so filling makes 3.8 to 11.3 reachable
each_strategy = pytest.mark.parametrize("strategy", sorted(STRATEGIES))
each_ties = pytest.mark.parametrize("ties", TIES)


@pytest.fixture(scope="module")
def made(tiny_profile):
    """Plans of the tiny profile, each made once."""

    @functools.cache
    def make(strategy, bpw=None, size=None, **options):
        return plan(tiny_profile, Budget.parse(bpw=bpw, size=size), strategy=strategy, **options)

    return make


def widths_of(plan):
    return {name: scheme.width for name, scheme in plan.units.items()}


def smallest_step(profile, plan):
    """Fewest bytes that widen one group of a plan, None where all are at the widest."""
    steps = []
    for group in tie_groups(profile.record.units, plan.ties):
        now = DEFAULT_WIDTHS.index(plan.units[group.units[0].name].width)
        if now + 1 < len(DEFAULT_WIDTHS):
            narrow, wide = (Scheme(width=DEFAULT_WIDTHS[i]) for i in (now, now + 1))
            steps.append(sum(wide.stored_bytes(u.shape) - narrow.stored_bytes(u.shape) for u in group.units))
    return min(steps, default=None)


def uniform_errors(profile, bpw):
    """Predicted divergence of the uniform plan whose bytes are nearest to a budget."""
    limit = Budget.parse(bpw=bpw).limit(sum(unit.weights for unit in profile.record.units))
    plans = [plan(profile, strategy="uniform", widths=(w,)) for w in DEFAULT_WIDTHS]
    return min(plans, key=lambda p: abs(p.account.units - limit)).predicted


@each_strategy
class TestEveryStrategy:
    @each_ties
    @pytest.mark.parametrize("bpw", BITS)
    def test_never_exceeds_its_bits_by_a_byte(self, made, tiny_profile, strategy, ties, bpw):
        found = made(strategy, bpw, ties=ties)
        limit = Budget.parse(bpw=bpw).limit(found.account.weights)
        units = {unit.name: unit.shape for unit in tiny_profile.record.units}
        assert found.account.units == sum(found.units[name].stored_bytes(shape) for name, shape in units.items())
        assert found.account.units <= limit

    @each_ties
    def test_never_exceeds_its_size_by_a_byte(self, made, tiny_profile, strategy, ties):
        size = made("uniform", 6.0).account.checkpoint + 12345
        found = made(strategy, size=size, ties=ties)
        units = {u.name: (u.layer, u.shape, found.units[u.name]) for u in tiny_profile.record.units}
        files = shards(kept_entries(tiny_profile), tiny_profile.record.layers, units)
        assert found.account.checkpoint == sum(shard.bytes for shard in files) <= size

    @each_ties
    def test_gives_every_unit_exactly_one_scheme_of_the_widths(self, made, tiny_profile, strategy, ties):
        found = made(strategy, 4.0, ties=ties)
        assert list(found.units) == [unit.name for unit in tiny_profile.record.units]
        settings = tiny_profile.record.settings
        for scheme in found.units.values():
            assert scheme.width in DEFAULT_WIDTHS
            assert (scheme.group_size, scheme.symmetric) == (settings.group_size, settings.symmetric)

    @each_ties
    @pytest.mark.parametrize("bpw", BITS)
    def test_respects_ties(self, made, tiny_profile, strategy, ties, bpw):
        widths = widths_of(made(strategy, bpw, ties=ties))
        for group in tie_groups(tiny_profile.record.units, ties):
            assert len({widths[unit.name] for unit in group.units}) == 1

    @pytest.mark.parametrize("bpw", BITS)
    def test_what_every_token_visits_keeps_the_floor(self, made, tiny_profile, strategy, bpw):
        widths = widths_of(plan(tiny_profile, Budget.parse(bpw=bpw), strategy=strategy, floors=FLOORS))
        assert all(widths[unit.name] >= FLOOR for unit in tiny_profile.record.units if unit.role != "expert")

    def test_a_floor_above_all_widths_still_holds(self, made, tiny_profile, strategy):
        widths = widths_of(plan(tiny_profile, Budget.parse(bpw=4.0), strategy=strategy, widths=(2, 3), floors=FLOORS))
        assert {widths[unit.name] for unit in tiny_profile.record.units if unit.role != "expert"} == {FLOOR}
        assert {widths[unit.name] for unit in tiny_profile.record.units if unit.role == "expert"} <= {2, 3}

    def test_is_deterministic(self, made, tiny_profile, strategy):
        again = plan(tiny_profile, Budget.parse(bpw=4.0), strategy=strategy)
        assert again == made(strategy, 4.0)

    @each_ties
    @pytest.mark.parametrize("bpw", BITS)
    def test_uses_the_budget(self, made, tiny_profile, strategy, ties, bpw):
        if strategy == "uniform":
            return  # one width for all: the rest of a budget is of no use to it
        found = made(strategy, bpw, ties=ties)
        unused = Budget.parse(bpw=bpw).limit(found.account.weights) - found.account.units
        step = smallest_step(tiny_profile, found)
        assert step is None or unused < step

    @pytest.mark.parametrize("budget", [{"bpw": 0.5}, {"size": 9000}, {"bpw": 15}, {"size": "1GB"}])
    def test_a_budget_out_of_reach_names_what_can_be_reached(self, made, strategy, budget):
        with pytest.raises(
            MoqaError,
            match=r"--(bpw|size) .*(below|above).*reachable with --widths 1,2,3,4,5,6,8( --floor \w+=4)*: ",
        ):
            made(strategy, **budget)

    @pytest.mark.parametrize("end", ["smallest", "largest"])
    @pytest.mark.parametrize("kind", ["bpw", "size"])
    def test_the_ends_of_what_can_be_reached_can_be_reached(self, made, tiny_profile, strategy, kind, end):
        expected = made("uniform", widths=(2,) if end == "smallest" else (8,))
        account = expected.account
        exact = {"bpw": account.bits_per_weight} if kind == "bpw" else {"size": account.checkpoint}
        found = plan(tiny_profile, Budget.parse(**exact), strategy=strategy, widths=(2, 3, 4, 6, 8), floors={})
        assert widths_of(found) == widths_of(expected)

    def test_fits_in_its_schema_and_comes_back_from_a_file(self, made, strategy, tmp_path):
        found = made(strategy, 4.0)
        path = tmp_path / "plan.json"
        write_json(found, path)
        assert read_json(Plan, path) == found
        jsonschema.validate(json.loads(path.read_text()), Plan.model_json_schema())
        written = path.read_bytes()
        write_json(read_json(Plan, path), path)
        assert path.read_bytes() == written

    def test_knows_only_what_it_may(self, tiny_profile, strategy):
        found = plan(tiny_profile, Budget.parse(bpw=4.0), strategy=strategy, known=["wiki"])
        assert found.known == ("wiki",)
        assert set(found.mixture) <= {"wiki", SELF}
        assert sum(found.mixture.values()) == pytest.approx(1)
        assert set(found.predicted) <= {"wiki", SELF}

    def test_a_dense_model(self, dense_profile, strategy):
        budget = Budget.parse(bpw=5.0)
        if STRATEGIES[strategy].needs_experts:
            with pytest.raises(MoqaError, match=r"tiny_dense.*has none: use uniform or auto or budget"):
                plan(dense_profile, budget, strategy=strategy)
        else:
            found = plan(dense_profile, budget, strategy=strategy)
            assert found.account.bits_per_weight <= 5.0

    @pytest.mark.parametrize("scope", ["global", "layer"])
    @pytest.mark.parametrize("objective", ["mean", "minimax"])
    def test_every_option_is_heard(self, made, strategy, scope, objective):
        found = made(strategy, 4.0, scope=scope, objective=objective)
        assert (found.options.scope, found.options.objective) == (scope, objective)
        assert found.account.bits_per_weight <= 4.0

    @pytest.mark.parametrize("widths", [(4,), (3, 16), (1, 2, 8), (1,), (16,)])
    def test_any_candidate_widths(self, made, tiny_profile, strategy, widths):
        widest = made("uniform", widths=widths).account
        for budget in ({"bpw": widest.bits_per_weight}, {"size": widest.checkpoint}):
            for objective in ("mean", "minimax"):
                options = {"strategy": strategy, "widths": widths, "objective": objective, "floors": {}}
                found = plan(tiny_profile, Budget.parse(**budget), **options)
                assert set(widths_of(found).values()) == {max(widths)}

    def test_a_hedge_is_for_those_who_take_one(self, made, strategy):
        if STRATEGIES[strategy].hedge is not None:
            assert made(strategy, 4.0, hedge=0.75).mixture[SELF] == 0.75
        else:
            with pytest.raises(MoqaError, match=f"does not apply to --strategy {strategy}"):
                made(strategy, 4.0, hedge=0.25)


@each_ties
@pytest.mark.parametrize("width", DEFAULT_WIDTHS)
@pytest.mark.parametrize("kind", ["bpw", "size"])
def test_uniform_at_its_own_size_gives_itself_back(tiny_profile, made, ties, width, kind):
    expected = made("uniform", ties=ties, widths=(width,))
    account = expected.account
    exact = {"bpw": account.bits_per_weight} if kind == "bpw" else {"size": account.checkpoint}
    found = made("uniform", ties=ties, **exact)
    assert found.units == expected.units
    assert found.account == account


class TestBudgeted:
    @each_ties
    def test_a_larger_budget_is_never_worse(self, made, ties):
        plans = [made("budget", bpw, ties=ties, known=("wiki",), hedge=0.0) for bpw in (3.8, 3.9, 4, 4.7, 5.5, 8)]
        errors = [found.predicted["wiki"] for found in plans]
        assert errors == sorted(errors, reverse=True)

    @each_ties
    @pytest.mark.parametrize("bpw", BITS)
    @pytest.mark.parametrize("other", sorted(STRATEGIES.keys() - {"budget"}))
    def test_predicts_no_more_error_than_any_other(self, made, ties, bpw, other):
        options = {"ties": ties, "known": ("wiki",)}
        ours = made("budget", bpw, hedge=0.0, **options).predicted["wiki"]
        assert ours <= made(other, bpw, **options).predicted["wiki"] * (1 + 1e-5)

    def test_a_hedge_costs_on_the_known_and_gains_on_the_models_own_text(self, made):
        plans = [made("budget", 4.0, known=("wiki",), hedge=hedge) for hedge in (0.0, 0.5, 1.0)]
        known, own = ([found.predicted[name] for found in plans] for name in ("wiki", SELF))
        assert known == sorted(known)
        assert own == sorted(own, reverse=True)
        assert known[0] < known[-1]
        assert own[-1] < own[0]

    @pytest.mark.parametrize("bpw", BITS)
    def test_minimax_protects_the_worst_distribution(self, made, tiny_profile, bpw):
        def worst(objective):
            found = made("budget", bpw, hedge=0.0, objective=objective).predicted
            return max(found[name] / uniform[name] for name in tiny_profile.names)

        uniform = uniform_errors(tiny_profile, bpw)
        assert worst("minimax") <= worst("mean") * (1 + 1e-3)

    def test_a_hedge_needs_the_models_own_text(self, tiny_profile):
        statistics = {name: found for name, found in tiny_profile.statistics.items() if name != SELF}
        alone = type(tiny_profile)(tiny_profile.record, tiny_profile.folder, statistics, tiny_profile.weights)
        with pytest.raises(MoqaError, match="profile again without that option, or plan with --hedge 0"):
            plan(alone, Budget.parse(bpw=4))
        assert SELF not in plan(alone, Budget.parse(bpw=4), hedge=0.0).mixture

    def test_experts_that_no_text_reached_get_the_fewest_bits(self, tiny_profile):
        changed = {name: dict(found) for name, found in tiny_profile.statistics.items()}
        table = changed["wiki"]["sensitivity"].clone()
        silent = [row for row, unit in enumerate(tiny_profile.record.units) if unit.expert == 3]
        table[silent] = 0.0
        changed["wiki"]["sensitivity"] = table
        starved = type(tiny_profile)(tiny_profile.record, tiny_profile.folder, changed, tiny_profile.weights)
        found = plan(starved, Budget.parse(bpw=4.6), known=["wiki"], hedge=0.0)
        assert {found.units[tiny_profile.record.units[row].name].width for row in silent} == {1}


class TestFrequency:
    def test_an_expert_that_is_picked_more_never_gets_fewer_bits(self, tiny_profile):
        # all weights as hard to round, so that only the router counts
        table = tiny_profile.weights["rounding"]
        weights = tiny_profile.weights | {"rounding": table.mean(0).expand_as(table)}
        profile = type(tiny_profile)(tiny_profile.record, tiny_profile.folder, tiny_profile.statistics, weights)
        found = plan(profile, Budget.parse(bpw=6), strategy="frequency", ties="expert", known=["wiki"])
        for layer in range(3):
            order = profile.layer("wiki", layer, "tokens").argsort().tolist()
            bits = [found.units[f"model.layers.{layer}.mlp.experts.{e}.up_proj"].width for e in order]
            assert bits == sorted(bits)
            assert bits[0] < bits[-1]


class TestClasses:
    def test_without_a_budget_the_paper_decides(self, tiny_profile):
        found = plan(tiny_profile, strategy="paper", ties="expert")
        assert found.budget is None
        experts = {unit.name for unit in tiny_profile.record.units if unit.role == "expert"}
        assert {scheme.width for name, scheme in found.units.items() if name in experts} == {2, 4, 6, 8}
        assert {scheme.width for name, scheme in found.units.items() if name not in experts} == {FLOOR}

    @pytest.mark.parametrize("strategy", ["paper", "paper-v1"])
    def test_a_more_significant_expert_never_gets_fewer_bits(self, tiny_profile, strategy):
        # no two experts alike, so that nothing but significance counts
        weights = {name: table if name == "rounding" else torch.eye(8) for name, table in tiny_profile.weights.items()}
        profile = type(tiny_profile)(tiny_profile.record, tiny_profile.folder, tiny_profile.statistics, weights)
        found = plan(profile, strategy=strategy, ties="expert", known=["wiki"], scope="layer")
        for layer in range(3):
            order = profile.significance("wiki", layer).argsort().tolist()
            bits = [found.units[f"model.layers.{layer}.mlp.experts.{e}.up_proj"].width for e in order]
            assert bits == sorted(bits)

    @pytest.mark.parametrize("strategy", ["frequency", "budget", "random"])
    def test_the_others_need_a_budget(self, tiny_profile, strategy):
        with pytest.raises(MoqaError, match=f"--strategy {strategy} needs a budget: give --bpw or --size"):
            plan(tiny_profile, strategy=strategy)

    @pytest.mark.parametrize("widths", [(2, 4), (3, 8)])
    def test_uniform_without_a_budget_is_the_widest(self, tiny_profile, widths):
        found = plan(tiny_profile, strategy="uniform", widths=widths)
        assert set(widths_of(found).values()) == {max(widths)}

    def test_seeds_make_different_random_plans(self, made):
        assert widths_of(made("random", 4.0, seed=1)) != widths_of(made("random", 4.0, seed=2))


@pytest.mark.parametrize(("former", "name"), [("moqa", "paper"), ("moqa-v1", "paper-v1"), ("moqa-budget", "budget")])
def test_former_names_are_accepted_and_not_written(made, former, name):
    found = made(former, 4.0)
    assert (found.strategy, found) == (name, made(name, 4.0))
    assert former not in STRATEGIES


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"strategy": "best"}, "--strategy best is unknown: there are .*budget"),
            ({"ties": "all"}, "--ties all is unknown: there are unit, expert"),
            ({"objective": "best"}, "--objective best is unknown: there are mean, minimax"),
            ({"scope": "unit"}, "--scope unit is unknown: there are global, layer"),
            ({"known": ["wiki", "german"]}, "--known wiki,german is not in the profile: it has wiki, novels"),
            ({"known": []}, "--known"),
            ({"hedge": 1.5}, "--hedge 1.5 is not a share"),
            ({"hedge": float("nan")}, "is not a share"),
            ({"widths": (2, 9)}, "--widths 2,9 cannot be planned: this profile has 1,"),
            ({"widths": ()}, "--widths"),
        ],
    )
    def test_are_explained(self, tiny_profile, options, match):
        with pytest.raises(MoqaError, match=match):
            plan(tiny_profile, Budget.parse(bpw=4), **options)


class TestFiles:
    def test_the_profile_is_found_from_the_plans_file(self, made, tiny_profile, tmp_path, monkeypatch):
        found = made("uniform", 4.0)
        path = tmp_path / "plans" / "a.json"
        write_json(for_file(found, path), path)
        assert not json.loads(path.read_text())["profile"].startswith("/")
        monkeypatch.chdir(tmp_path)
        for typed in (path, "plans/a.json"):
            assert (tmp_path / read_plan(typed).profile).resolve() == tiny_profile.folder.resolve()

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"format": 2}, "upgrade moqa"),
            ({"units": {"a": {"width": 9}}}, r"is not a plan: units\.a"),
            ({"strategy": None}, "is not a plan: strategy"),
            ({"ties": "all"}, "is not a plan: ties"),
        ],
    )
    def test_a_wrong_field_is_named(self, made, tmp_path, change, match):
        path = tmp_path / "plan.json"
        write_json(made("uniform", 4.0).model_dump(mode="json") | change, path)
        with pytest.raises(MoqaError, match=match):
            read_plan(path)

    @pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff"])
    def test_what_is_no_plan(self, tmp_path, raw):
        (tmp_path / "plan.json").write_bytes(raw)
        with pytest.raises(MoqaError, match="plan"):
            read_plan(tmp_path / "plan.json")
        with pytest.raises(MoqaError, match="no plan at"):
            read_plan(tmp_path / "missing.json")
