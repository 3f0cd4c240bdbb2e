"""The width of every unit, from plans and checkpoints."""

import math
import re
from dataclasses import dataclass, field, replace

from moqa.format.layout import entry_bytes
from moqa.format.manifest import StoredUnit
from moqa.format.scheme import Scheme
from moqa.planning import STRATEGIES, Account
from moqa.planning.record import Gain
from moqa.profiling.record import UnitRecord
from moqa.reports.gather import Artifacts

_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Allocation:
    """The width of every unit.

    Attributes:
        label: strategy, hedge and size; numbered if several allocations have the same ones.
        account: byte account.
        hedge: share of the model's own text in the objective.
        ties: which units share a width.
        mixture: share of each distribution in the fit.
        places: all units with their widths.
        gains: expected gain over uniform on each distribution, of plans from profiles with sensitivities.
    """

    label: str
    account: Account
    hedge: float | None
    ties: str
    mixture: dict[str, float]
    places: tuple[tuple[UnitRecord, int], ...]
    gains: dict[str, Gain] = field(default_factory=dict)

    @property
    def widths(self) -> dict[int, float]:
        """Width -> share of the weights, narrowest first."""
        total = sum(unit.weights for unit, _ in self.places)
        counts: dict[int, int] = {}
        for unit, width in sorted(self.places, key=lambda place: place[1]):
            counts[width] = counts.get(width, 0) + unit.weights
        return {width: weights / total for width, weights in counts.items()}


def allocations(found: Artifacts) -> list[Allocation]:
    """All distinct allocations of plans and checkpoints, ordered by size."""
    units = {u.name: u for profile in found.profiles for u in profile.record.units}
    for checkpoint in found.checkpoints:
        units = {name: _unit(name, stored) for name, stored in checkpoint.manifest.units.items()} | units
    made: dict[object, Allocation] = {}
    for plan in found.plans.values():
        same = made.get(_key(plan.units))
        label = plan.label if same is None else _joined(same.label, plan.label)
        made[_key(plan.units)] = Allocation(
            label, plan.account, plan.options.hedge, plan.ties, plan.mixture, _places(plan.units, units), plan.gains,
        )  # fmt: skip
    for checkpoint in found.checkpoints:
        m = checkpoint.manifest
        schemes = {name: stored.scheme for name, stored in m.units.items()}
        if _key(schemes) not in made:
            entries = checkpoint.shards[0].entries.values()
            stored_bytes = sum(u.scheme.stored_bytes(u.shape) for u in m.units.values())
            kept = sum(map(entry_bytes, entries))
            account = Account(
                units=stored_bytes, kept=kept, headers=checkpoint.bytes - stored_bytes - kept,
                weights=checkpoint.unit_weights, kept_weights=sum(math.prod(shape) for _, shape in entries),
            )  # fmt: skip
            hedge = None if m.options.get("hedge") is None else float(m.options["hedge"] or 0)
            strategy = STRATEGIES.current(m.strategy)
            label = strategy if hedge is None else f"{strategy} hedge {hedge:g}"
            made[_key(schemes)] = Allocation(label, account, hedge, m.ties, m.mixture, _places(schemes, units))
    # sizes within half a percent count as equal
    return _distinct_labels(sorted(made.values(), key=lambda a: (round(math.log(a.account.checkpoint) * 200), a.label)))


def _joined(label: str, other: str) -> str:
    """Label of an allocation that several strategies chose."""
    names = label.split(" = ")
    return label if other in names else " = ".join([*names, other])


def _distinct_labels(made: list[Allocation]) -> list[Allocation]:
    counts: dict[str, int] = {}
    result = []
    for one in made:
        names = one.label.split(" = ")
        short = one.label if len(names) < 3 else f"{names[0]} and {len(names) - 1} others alike"
        label = f"{short}, {one.account.checkpoint / 2**20:.2f} MiB"
        counts[label] = counts.get(label, 0) + 1
        again = f" ({counts[label]})" if counts[label] > 1 else ""
        result.append(replace(one, label=label + again))
    return result


def _key(schemes: dict[str, Scheme]) -> object:
    return tuple(sorted((n, s.width, s.group_size, s.symmetric, s.encoding) for n, s in schemes.items()))


def _unit(name: str, stored: StoredUnit | None = None) -> UnitRecord:
    """A unit by its name and what a checkpoint says of it; of one weight if no artifact has its shape."""
    expert = _number(_EXPERT, name)
    layer, shape = _number(_LAYER, name) or 0, (1, 1)
    role = "expert" if expert is not None else "attention" if "attn" in name else "mlp"
    if stored is not None:
        layer, role, shape = stored.layer, stored.role, stored.shape
    projection = name.rpartition(".")[2]
    return UnitRecord(name=name, layer=layer, role=role, projection=projection, expert=expert, shape=shape)


def _places(schemes: dict[str, Scheme], units: dict[str, UnitRecord]) -> tuple[tuple[UnitRecord, int], ...]:
    return tuple((units.get(name) or _unit(name), scheme.width) for name, scheme in schemes.items())


def _number(pattern: re.Pattern[str], name: str) -> int | None:
    match = pattern.search(name)
    return int(match[1]) if match else None
