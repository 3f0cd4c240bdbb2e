"""`moqa.plan`: choose a scheme for every unit from a profile, within a budget."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np

from moqa import __version__
from moqa.errors import MoqaError
from moqa.format.encodings import ENCODINGS
from moqa.format.tiles import KEEP_WIDTH
from moqa.planning.account import account_of, fixed_bytes
from moqa.planning.budget import Budget
from moqa.planning.candidates import (
    candidates,
    check_encodings,
    check_groups,
    smallest_widths,
)
from moqa.planning.engines import ENGINES, OWN, Engine, Ties
from moqa.planning.expected import expected_gains
from moqa.planning.fixed import fixed_widths
from moqa.planning.problem import Choice, Problem, make_problem
from moqa.planning.record import FORMAT, Objective, Options, Plan, Scope
from moqa.planning.registry import DEFAULT_ENCODINGS, DEFAULT_STRATEGY, STRATEGIES, Strategy, for_dense_models
from moqa.planning.solver import Solution
from moqa.planning.ties import tie_groups
from moqa.profiling import SELF, Profile
from moqa.profiling.further import with_further
from moqa.profiling.others import with_errors_of
from moqa.registry import check_known
from moqa.storage.artifact import check_format, check_seal, read_json
from moqa.storage.paths import label
from moqa.tasks import find_task

DEFAULT_WIDTHS = (1, 2, 3, 4, 5, 6, 8)


def plan(
    profile: Profile,
    budget: Budget | str | None = None,
    *,
    strategy: str = DEFAULT_STRATEGY,
    engine: str = OWN,
    ties: Ties | None = None,
    known: Sequence[str] | None = None,
    widths: Sequence[int] = DEFAULT_WIDTHS,
    hedge: float | None = None,
    objective: Objective = "mean",
    scope: Scope = "global",
    fixed: Mapping[str, int] | None = None,
    encodings: Sequence[str] = DEFAULT_ENCODINGS,
    groups: Sequence[int] | None = None,
    floors: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Plan:
    """Choose a scheme for every unit: its width, and where a strategy mixes them, its encoding and group size.

    >>> plan = moqa.plan(profile, "3bpw", strategy="budget")
    >>> plan.account.bits_per_weight <= 3
    True

    Args:
        profile: statistics of the model.
        budget: limit in bytes, e.g. "2.5bpw" (of the units) or "12MiB" (all weight files); None is allowed for
            strategies that follow a rule of their own.
        strategy: one of `moqa.planning.STRATEGIES`.
        engine: that will run the model, one of `moqa.planning.ENGINES`: a plan for another one than moqa's own has only
            the schemes and ties that it runs. The original's weights are read, to see what these cost.
        ties: which units must share a width, see `moqa.planning.TIES`; None means the finest that the engine runs.
        known: distributions of the profile to fit on; None means all.
        widths: candidate widths.
        hedge: share of the model's own text in the objective, 0 to 1; None means the strategy's default.
        objective: `mean` or `minimax` over the known distributions.
        scope: rank experts of all layers together (`global`) or layer by layer (`layer`).
        fixed: pattern of unit names, such as `*.layers.0.*` -> width of these units, 16 for no quantization; the last
            pattern that matches counts. The budget holds for all units together.
        encodings: candidate encodings, for llama.cpp its types; strategies that do not mix them take the first that
            has a width.
        groups: candidate numbers of weights that share a scale, of those that the profile has; strategies that do not
            mix them take the first. None means all, that of the profile first.
        floors: role of units -> their smallest width; other roles have none. None means the strategy's.
        seed: seed of a random plan.

    Raises:
        MoqaError: if the strategy, engine, ties or a distribution is unknown, a pattern matches no unit, the strategy
            or engine does not support the model or what was asked for, or no plan can keep the budget.
    """
    budget, given = Budget.of(budget) if isinstance(budget, str) else budget, tuple(widths)
    member = STRATEGIES.find(strategy)
    runs = ENGINES.find(engine)
    ties = runs.checked(ties)
    check_known("--objective", objective, get_args(Objective))
    check_known("--scope", scope, get_args(Scope))
    known = tuple(profile.names if known is None else known)
    absent = [name for name in known if name not in profile.names]
    if absent or not known:
        raise MoqaError(f"--known {','.join(known)} is not in the profile", f"it has {', '.join(profile.names)}")
    share = _checked_hedge(hedge, member, profile, budget, engine)
    options = Options(hedge=share, objective=objective, scope=scope, seed=seed)
    usual = tuple(encodings) == DEFAULT_ENCODINGS
    lowest = smallest_widths(floors, member.floor, any(unit.role == "expert" for unit in profile.record.units))
    tied = tie_groups(profile.record.units, ties)
    chosen_widths = fixed_widths(profile, tied, fixed or {})
    fixed_size = fixed_bytes(profile, engine)  # refuses a model that the engine does not run, before weights are read
    if runs.schemes is not None:
        named = None if usual else encodings
        widths = _widths_of(runs, given, profile)
        schemes = runs.candidates(_needed(widths, lowest, chosen_widths), named, groups, member.mixes)
        profile = with_errors_of(profile, schemes)
    else:
        if usual:  # those that the profile has: one of an earlier moqa has no others
            encodings = [name for name in encodings if name in profile.encodings]
        encodings = check_encodings(encodings, profile.encodings)
        widths = _checked_widths(widths, profile, encodings)
        schemes = candidates(
            _needed(widths, lowest, chosen_widths), encodings,
            check_groups(profile.groups if groups is None else groups, profile.groups),
            symmetric=profile.record.settings.symmetric, mixed=member.mixes,
        )  # fmt: skip
    problem = make_problem(
        profile, known, groups=tied, schemes=schemes, widths=widths, floors=lowest, fixed=chosen_widths, budget=budget,
        options=options, fixed_bytes=fixed_size, engine=engine,
    )  # fmt: skip
    _check_reachable(problem, budget)
    check_budget(member, budget, "give --bpw or --size")
    if member.needs_experts and not problem.routed_experts():
        raise MoqaError(
            f"--strategy {strategy} ranks experts, but {profile.record.model} ({profile.record.model_type}) has none",
            f"use {' or '.join(for_dense_models())}",
        )
    if member.measures:
        problem = replace(problem, profile=with_further(profile, member.measures, known, f"--strategy {strategy}"))
    chosen = member.choose(problem)
    made = chosen if isinstance(chosen, Solution) else Solution(chosen, gap=None)
    choice = made.choice
    if not problem.fits(choice):
        raise MoqaError(
            f"--strategy {strategy} has no plan within {budget.typed if budget else 'the budget'}", _reachable(problem)
        )
    units = problem.units(choice)
    names = [*known, *([SELF] if SELF in profile.statistics else [])]
    # with a hedge, the quantization also fits the model's own text, with at least the weight of one more distribution
    own = max(share, 1 / (len(known) + 1)) if share else 0.0
    mixture = {n: (1 - own) / len(known) for n in known if own < 1} | ({SELF: own} if own else {})
    return Plan(
        moqa=__version__, model=label(profile.original), model_type=profile.record.model_type,
        fingerprint=profile.record.fingerprint, samples=profile.digest(mixture), profile=str(profile.folder),
        strategy=made.by or member.name, options=options, engine=engine, ties=ties,
        budget=budget.typed if budget else None, known=known,
        widths=None if given == DEFAULT_WIDTHS else widths, fixed=dict(fixed or {}), mixture=mixture,
        encodings=None if usual else tuple(encodings),
        group_size=profile.record.settings.group_size, symmetric=profile.record.settings.symmetric,
        groups=None if groups is None else tuple(groups), floors=None if floors is None else dict(floors),
        predicted={n: _predicted(problem, choice, n) for n in names if profile.record.settings.sensitivity},
        gains=expected_gains(profile, units, names) if profile.record.settings.sensitivity else {},
        gap=made.gap, account=account_of(profile, units, engine), units=units,
    )  # fmt: skip


def read_plan(path: str | Path) -> Plan:
    """Read a plan; the path of its profile is resolved against the plan's folder, its strategy has its present name.

    >>> _ = Path("plan.json").write_text(plan(profile, "3bpw").model_dump_json())
    >>> read_plan("plan.json").strategy
    'budget'

    Raises:
        MoqaError: if the file is not a plan or was changed, or its format is newer than this moqa.
    """
    path = Path(path)
    stored = read_json(Plan, path, "moqa plan")
    check_format(f"{path} has plan", stored.format, FORMAT)
    check_seal(path)
    folder = os.path.normpath(path.parent / stored.profile)
    return stored.model_copy(update={"profile": folder, "strategy": STRATEGIES.current(stored.strategy)})


def for_file(plan: Plan, path: str | Path) -> Plan:
    """The plan as it is written to a file: the path of its profile is relative to that file."""
    relative = os.path.relpath(plan.profile, Path(path).parent)
    return plan.model_copy(update={"profile": relative})


def check_budget(strategy: Strategy, budget: Budget | None, remedy: str) -> None:
    """Refuse a missing budget for a strategy that needs one.

    Raises:
        MoqaError: if the budget is missing; the message names the strategy.
    """
    if budget is None and strategy.needs_budget:
        raise MoqaError(f"--strategy {strategy.name} needs a budget", remedy)


def _checked_hedge(
    hedge: float | None, strategy: Strategy, profile: Profile, budget: Budget | None, engine: str
) -> float | None:
    """The hedge that was given, or else the strategy's default."""
    if hedge is not None and strategy.hedge is None:
        hedged = ", ".join(name for name, member in STRATEGIES.items() if member.hedge is not None)
        raise MoqaError(f"--hedge {hedge:g} does not apply to --strategy {strategy.name}", f"it applies to {hedged}")
    if hedge is not None and not 0 <= hedge <= 1:
        raise MoqaError(f"--hedge {hedge:g} is not a share", "give a number from 0 to 1")
    # a model that cannot write samples has no text of its own to hedge with
    share = hedge
    if hedge is None and strategy.hedge is not None:
        share = strategy.hedge(_bits(budget, profile, engine)) if find_task(profile.record.task).writes_samples else 0.0
    if share and SELF not in profile.statistics:
        raise MoqaError(
            f"--hedge {share:g} needs the model's own text, but the profile was made with --self-samples 0",
            "profile again without that option, or plan with --hedge 0",
        )
    return share


def _bits(budget: Budget | None, profile: Profile, engine: str) -> float | None:
    """Stored bits per weight that a budget leaves for the units."""
    if budget is None:
        return None
    weights = sum(unit.weights for unit in profile.record.units)
    kept = fixed_bytes(profile, engine) if budget.counts == "checkpoint" else 0
    return (budget.limit(weights) - kept) * 8 / weights


def _needed(widths: Sequence[int], lowest: Mapping[str, int], chosen: Mapping[int, int]) -> list[int]:
    """Candidate widths, and those that only floors and the user's choices need."""
    beyond = {width for width in lowest.values() if width > max(widths)}
    return sorted({*widths, *chosen.values(), *beyond})


def _widths_of(engine: Engine, given: Sequence[int], profile: Profile) -> tuple[int, ...]:
    """Candidate widths of a plan for another engine."""
    assert engine.schemes is not None
    there = sorted({scheme.width for scheme in engine.schemes()} & set(profile.record.widths))
    known = (*there, KEEP_WIDTH)
    if tuple(given) == DEFAULT_WIDTHS:
        return tuple(there)
    bad = [width for width in given if width not in known]
    if bad or not given:
        typed = f"--engine {engine.name} does not run --widths {','.join(map(str, given))}"
        raise MoqaError(typed, f"it runs {', '.join(map(str, known))}")
    return tuple(sorted(set(given)))


def _checked_widths(widths: Sequence[int], profile: Profile, encodings: Sequence[str]) -> tuple[int, ...]:
    measured = (*profile.record.widths, KEEP_WIDTH)
    if tuple(widths) == DEFAULT_WIDTHS:  # those of them that there are
        having = {width for name in encodings for width in ENCODINGS[name].widths}
        return tuple(width for width in widths if width in measured and width in having)
    bad = [width for width in widths if width not in measured]
    if bad or not widths:
        raise MoqaError(
            f"--widths {','.join(map(str, widths))} cannot be planned",
            f"this profile has {', '.join(map(str, measured))}",
        )
    return tuple(sorted(set(widths)))


def _check_reachable(problem: Problem, budget: Budget | None) -> None:
    if budget is None or problem.limit is None:
        return
    if problem.bytes(problem.smallest()) > problem.limit:
        smallest = account_of(problem.profile, problem.units(problem.smallest()), problem.engine)
        raise budget.below(smallest.checkpoint, _reachable(problem))
    # a budget far above the largest plan is probably a typing error; one slightly above it asks for the best quality
    if budget.fills and problem.limit > problem.bytes(problem.widest()) * 1.05:
        raise MoqaError(f"{budget.typed} is above the largest plan of this profile", _reachable(problem))


def _reachable(problem: Problem) -> str:
    both = (problem.smallest(), problem.widest())
    ends = [account_of(problem.profile, problem.units(choice), problem.engine) for choice in both]
    bits = " to ".join(f"{account.bits_per_weight:.2f}" for account in ends)
    sizes = " to ".join(f"{account.checkpoint / 2**20:.1f} MiB" for account in ends)
    widths = ",".join(map(str, sorted(set(problem.widths))))
    roles = {unit.role for unit in problem.profile.record.units}
    floors = "".join(f" --floor {role}={width}" for role, width in problem.floors.items() if role in roles)
    return f"reachable with --widths {widths}{floors}: {bits} bpw, {sizes}"


def _predicted(problem: Problem, choice: Choice, name: str) -> float:
    return float(problem.errors(name)[np.arange(len(choice)), choice].sum())


def check_profile(plan: Plan, profile: Profile) -> None:
    """Refuse a profile that a plan was not made from, and a plan whose units are no longer those of its account.

    >>> check_profile(plan(profile, "3bpw"), profile)

    Raises:
        MoqaError: naming the difference.
    """
    absent = [name for name in (*plan.known, *plan.mixture) if name not in profile.statistics]
    if profile.record.fingerprint != plan.fingerprint or absent:
        lack = f"lacks {', '.join(dict.fromkeys(absent))}" if absent else f"is of {profile.record.model}"
        raise MoqaError(f"profile {profile.folder} {lack}", "it is not the one that the plan was made from")
    if plan.samples and plan.samples != profile.digest(plan.mixture):
        raise MoqaError(f"profile {profile.folder} has other samples than the plan", "plan again from this profile")
    different = sorted({unit.name for unit in profile.record.units} ^ plan.units.keys())
    if different:
        raise MoqaError(f"the plan and profile {profile.folder} differ in unit {different[0]}", "plan again from it")
    if (found := account_of(profile, plan.units, plan.engine)) != plan.account:
        raise MoqaError(
            f"the plan's units take {found.checkpoint} bytes, its account says {plan.account.checkpoint}",
            "it was edited: plan again",
        )
