"""`moqa vla plan`: choose a scheme for every unit of a policy by alignment and actions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from moqa.errors import MoqaError
from moqa.planning import Budget, Plan, plan
from moqa.planning.run import DEFAULT_WIDTHS
from moqa.profiling import Profile
from moqa.registry import check_known
from moqa.vla.measure import DEFAULT_ALIGNMENT, combined

# what a plan is made by -> strategy of `moqa.plan`, and share of alignment in its cost (None: it has no cost)
WAYS: dict[str, tuple[str, float | None]] = {
    "output-error": ("budget", 0.0),
    "aligned": ("budget", DEFAULT_ALIGNMENT),
    "random": ("random", None),
    "uniform": ("uniform", None),
}


def plan_policy(
    profile: Profile,
    budget: Budget | str | None,
    *,
    by: str = "output-error",
    alignment: float | None = None,
    floors: Mapping[str, int] | None = None,
    fixed: Mapping[str, int] | None = None,
    widths: Sequence[int] = DEFAULT_WIDTHS,
    groups: Sequence[int] | None = None,
    seed: int = 0,
) -> Plan:
    """Choose a scheme for every unit.

    >>> plan_policy(profile, "3bpw").account.bits_per_weight <= 3  # doctest: +SKIP
    True

    Args:
        profile: by `moqa vla profile`.
        budget: limit in bytes, e.g. "2.5bpw" (of the units) or "2MiB" (all weight files); `uniform` can do without.
        by: `output-error` (of the actions), `aligned` (alignment and actions), `random`, or `uniform`.
        alignment: share of alignment in the cost of `aligned`; None means half.
        floors: part -> smallest width of its units: `vision`, `projector`, `language` and `action`.
        fixed: pattern of unit names -> width, 16 for no quantization.
        widths: candidate widths.
        groups: candidate numbers of weights that share a scale; None means all of the profile.
        seed: of a random plan.

    Raises:
        MoqaError: if the profile is not of a policy, a way or a part is unknown, or no plan can keep the budget.
    """
    if profile.record.task != "policy":
        what = f"profile {profile.folder} is of {profile.record.model}, which is no policy"
        raise MoqaError(what, "plan with moqa plan")
    check_known("--by", by, WAYS)
    name, share = WAYS[by]
    if alignment is not None:
        if by != "aligned":
            raise MoqaError(f"--alignment {alignment:g} does not apply to --by {by}", "it applies to aligned")
        if not 0 <= alignment <= 1:
            raise MoqaError(f"--alignment {alignment:g} is not a share", "give a number from 0 to 1")
        share = alignment
    if share is not None:
        profile = replace(
            profile,
            statistics={
                source: {**tables, "sensitivity": combined(tables, share)}
                for source, tables in profile.statistics.items()
            },
        )
    made = plan(
        profile, budget, strategy=name, floors=floors, fixed=fixed, widths=widths, groups=groups, seed=seed
    )  # fmt: skip
    return made.model_copy(update={"strategy": by})
