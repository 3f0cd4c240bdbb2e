"""Ties: units that must share a width because an inference engine requires it."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from moqa.planning.engines import Ties
from moqa.profiling.record import UnitRecord

# What each tie is for. Every kind of tie has its own solve: a plan is never rounded to coarser ties afterwards.
TIES: dict[Ties, str] = {
    "unit": "no ties: every matrix has its own width (moqa's own runtime)",
    "expert": "the matrices of one expert share a width",
    "layer_projection": "all experts of a layer share a width per projection (GGUF, MLX)",
    "layer": "all experts of a layer share one width, and so do its attention matrices (vLLM, SGLang)",
}


@dataclass(frozen=True)
class Group:
    """Units that share a width.

    Attributes:
        members: rows of the units in the profile's tables.
        units: the units themselves.
    """

    members: tuple[int, ...]
    units: tuple[UnitRecord, ...]


def tie_groups(units: Sequence[UnitRecord], ties: Ties) -> list[Group]:
    """Group the units that share a width, in the order of their first members.

    >>> len(tie_groups(profile.record.units, "layer"))
    12

    Args:
        units: all units of a model.
        ties: one of `TIES`.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, unit in enumerate(units):
        groups.setdefault(_key(unit, ties), []).append(row)
    return [Group(tuple(rows), tuple(units[row] for row in rows)) for rows in groups.values()]


def _key(unit: UnitRecord, ties: Ties) -> Hashable:
    if ties == "layer":
        return unit.layer, unit.role
    if ties == "layer_projection":
        return (unit.layer, unit.role, unit.projection) if unit.role == "expert" else unit.name
    if ties == "expert" and unit.role in ("expert", "shared"):
        return unit.layer, unit.role, unit.expert
    return unit.name
