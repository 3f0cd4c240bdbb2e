"""The input of every strategy: groups of units, the widths allowed for each, their bytes and errors."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moqa.errors import MoqaError
from moqa.format.layout import unit_bytes
from moqa.format.scheme import Scheme
from moqa.format.tiles import KEEP_WIDTH
from moqa.planning.budget import Budget
from moqa.planning.engines import ENGINES, OWN
from moqa.planning.record import Options
from moqa.planning.ties import Group
from moqa.profiling import SELF, Profile

Choice = NDArray[np.int64]


@dataclass(frozen=True)
class Problem:
    """One allocation problem.

    Attributes:
        profile: the statistics.
        known: distributions that may be used.
        groups: units that share a scheme.
        schemes: candidates, by rising bytes; what is said of widths below holds for them.
        sizes: [groups, schemes] bytes.
        allowed: [groups, schemes] whether a group may have a scheme; some groups have a smallest allowed width.
        floors: role -> smallest width of its units.
        limit: bytes for all groups; None without a budget.
        options: options of the strategy.
        engine: whose files the bytes are those of.
    """

    profile: Profile
    known: tuple[str, ...]
    groups: tuple[Group, ...]
    schemes: tuple[Scheme, ...]
    sizes: NDArray[np.int64]
    allowed: NDArray[np.bool_]
    floors: Mapping[str, int]
    limit: int | None
    options: Options
    engine: str = OWN

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each candidate."""
        return tuple(scheme.width for scheme in self.schemes)

    def table(self, rows: NDArray) -> NDArray[np.float64]:
        """[groups, schemes] sums over each group of a [units, measured widths] table of errors."""
        picked = [scheme_errors(self.profile, rows, scheme) for scheme in self.schemes]
        return summed(self.groups, np.stack(picked, axis=1))

    def errors(self, name: str) -> NDArray[np.float64]:
        """[groups, schemes] expected increase of the KL divergence per token on one distribution, in nats."""
        return self.table(self.profile.sensitivity(name).double().numpy())

    def own_errors(self) -> NDArray[np.float64]:
        """[groups, schemes] the same on the model's own text."""
        return self.errors(SELF)

    def masked(self, costs: NDArray) -> NDArray[np.float64]:
        """[..., groups, schemes] costs, infinite for those that are not allowed."""
        return np.where(self.allowed, costs, np.inf)

    def smallest(self) -> Choice:
        """The smallest allowed scheme of each group."""
        return np.where(self.allowed, self.sizes, np.iinfo(np.int64).max).argmin(1)

    def at_width(self, width: int) -> Choice:
        """`width` for every group; where it is not allowed, the next wider allowed width, or else the widest."""
        fits = self.allowed & (np.array(self.widths) >= width)
        return np.where(fits.any(1), fits.argmax(1), self.widest())

    def widest(self) -> Choice:
        """The largest allowed scheme of each group."""
        return np.where(self.allowed, self.sizes, -1).argmax(1)

    def units(self, choice: Choice) -> dict[str, Scheme]:
        """Unit name -> scheme of a choice, in the order of the profile."""
        chosen: dict[str, Scheme] = {}
        for group, index in zip(self.groups, choice, strict=True):
            chosen.update({unit.name: self.schemes[index] for unit in group.units})
        return {unit.name: chosen[unit.name] for unit in self.profile.record.units}

    def bytes(self, choice: Choice) -> int:
        """Total bytes of a choice."""
        return int(self.sizes[np.arange(len(self.groups)), choice].sum())

    def fits(self, choice: Choice) -> bool:
        """Whether a choice is within the budget."""
        return self.limit is None or self.bytes(choice) <= self.limit

    @property
    def needed_limit(self) -> int:
        """The limit, for strategies that are registered with `needs_budget`."""
        assert self.limit is not None
        return self.limit

    def routed_experts(self) -> dict[tuple[int, int], list[int]]:
        """(layer, expert) -> indices of the groups that contain its units."""
        found: dict[tuple[int, int], list[int]] = {}
        for index, group in enumerate(self.groups):
            for unit in group.units:
                if unit.role == "expert" and unit.expert is not None:
                    rows = found.setdefault((unit.layer, unit.expert), [])
                    if index not in rows:
                        rows.append(index)
        return found

    def fill(self, choice: Choice, order: Sequence[int]) -> Choice:
        """Widen groups in the given order, one width step per group and round, for as long as the budget allows."""
        choice = choice.copy()
        size = self.bytes(choice)
        raised = True
        while raised and self.limit is not None:
            raised = False
            for index in order:
                wider = next((w for w in range(choice[index] + 1, len(self.widths)) if self.allowed[index, w]), None)
                if wider is not None:
                    more = int(self.sizes[index, wider] - self.sizes[index, choice[index]])
                    if size + more <= self.limit:
                        choice[index], size, raised = wider, size + more, True
        return choice


def make_problem(
    profile: Profile,
    known: tuple[str, ...],
    *,
    groups: Sequence[Group],
    schemes: Sequence[Scheme],
    widths: Sequence[int],
    floors: Mapping[str, int],
    fixed: Mapping[int, int],
    budget: Budget | None,
    options: Options,
    fixed_bytes: int,
    engine: str = OWN,
) -> Problem:
    """Collect the input of a strategy.

    Args:
        profile: the statistics.
        known: distributions that may be used.
        groups: units that share a scheme.
        schemes: candidates, by rising bytes; some have widths that only fixed groups or floors need.
        widths: that all other groups may have.
        floors: role -> smallest width of its units.
        fixed: index of a group -> the only width that it may have.
        budget: the user's limit.
        options: options of the strategy.
        fixed_bytes: bytes of the weight files that no choice changes; counted if the budget is for all weight files.
        engine: whose files the bytes are those of.

    Raises:
        MoqaError: if no candidate can hold a unit.
    """
    whole = budget is not None and budget.counts == "checkpoint"
    sizes = summed(groups, _unit_sizes(profile, schemes, headers=whole and ENGINES[engine].export != "gguf"))
    shapes = [{unit.shape for unit in group.units} for group in groups]
    fits = ENGINES[engine].holds
    holds = np.array([[all(fits(scheme, shape) for shape in some) for scheme in schemes] for some in shapes])
    column = np.array([scheme.width for scheme in schemes])
    smallest = np.array([[max(floors.get(unit.role, 0) for unit in group.units)] for group in groups])
    # a floor above all widths leaves the narrowest of the others
    usual = holds & np.isin(column, list(widths))[None] & (column[None] >= smallest)
    above = np.where(holds & (column[None] >= smallest), column[None], KEEP_WIDTH).min(1, keepdims=True)
    allowed = np.where(usual.any(1, keepdims=True), usual, holds & (column[None] == above))
    for group, width in fixed.items():
        allowed[group] = holds[group] & (column == width)
    if not (some := allowed.any(1)).all():
        unit = groups[int(some.argmin())].units[0]
        raise MoqaError(
            f"{unit.name} has rows of {unit.shape[1]} weights, which no candidate of --engine {engine} can hold",
            f"add --widths {KEEP_WIDTH} or give --ignore '{unit.name}'",
        )
    limit = None
    if budget is not None:
        limit = budget.limit(sum(unit.weights for unit in profile.record.units)) - (fixed_bytes if whole else 0)
    return Problem(profile, known, tuple(groups), tuple(schemes), sizes, allowed, floors, limit, options, engine)


def scheme_errors(profile: Profile, tables: NDArray, scheme: Scheme) -> NDArray:
    """[..., units] errors of a scheme, by [..., units, measured widths] tables of errors in the profile's own scheme.

    >>> scheme_errors(profile, profile.folds("wiki").double().numpy(), Scheme(width=2)).shape[-1]
    312
    """
    if scheme.is_unquantized:
        return np.zeros(tables.shape[:-1])
    return tables[..., profile.record.widths.index(scheme.width)] * profile.compared(scheme).double().numpy()


def summed(groups: Sequence[Group], rows: NDArray) -> NDArray:
    """[groups, ...] sums over the members of each group of [units, ...] rows.

    >>> from moqa.planning.ties import tie_groups
    >>> units = profile.record.units
    >>> summed(tie_groups(units, "layer"), np.ones((len(units), 1))).shape
    (12, 1)
    """
    if len(groups) == len(rows):  # of one unit each, in the order of the units
        return rows
    return np.stack([rows[list(group.members)].sum(0) for group in groups])


def _unit_sizes(profile: Profile, schemes: Sequence[Scheme], headers: bool) -> NDArray[np.int64]:
    """[units, schemes] bytes of each unit's tensors, with or without their entries in a header."""
    known: dict[tuple, list[int]] = {}
    found = []
    for unit in profile.record.units:
        # an entry is as long as the unit's name is in JSON
        alike = unit.shape, len(json.dumps(unit.name)) if headers else 0
        if alike not in known:
            known[alike] = [
                unit_bytes(unit.name, unit.shape, s) if headers else s.stored_bytes(unit.shape) for s in schemes
            ]
        found.append(known[alike])
    return np.array(found)
