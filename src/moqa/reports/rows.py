"""Evaluations as table rows: roles of distributions, groups of equal size, the best row of each group."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from moqa.evaluation import Evaluation, Quality
from moqa.evaluation.proof import interpolated
from moqa.planning.registry import OPTIMUM, PLAIN
from moqa.reports.gather import Artifacts

Role = Literal["known", "novel"]
ROLES: tuple[Role, ...] = ("known", "novel")
OURS, BASELINE = OPTIMUM, PLAIN
MEBIBYTE = 2**20
SAME_SIZE = 0.005


@dataclass(frozen=True)
class Row:
    """One evaluated model.

    Attributes:
        evaluation: its record.
        names: known distributions, which an evaluated checkpoint was fitted on, and novel ones, all others.
        ours: whether the page judges it: the checkpoint of a proof, or of our strategy.
        interpolated: whether it was not measured, but computed from a smaller and a larger one.
    """

    evaluation: Evaluation
    names: dict[Role, tuple[str, ...]]
    ours: bool = False
    interpolated: bool = False

    @property
    def original(self) -> bool:
        """Whether it is an original model."""
        return self.evaluation.strategy is None and self.evaluation.format is None

    @property
    def kind(self) -> str:
        """Strategy of a checkpoint, or format and name of a model that another tool has quantized."""
        e = self.evaluation
        return e.strategy or (f"{e.format} {Path(e.model).name}" if e.format else "original")

    @property
    def name(self) -> str:
        """Strategy, method and share of the model's own text."""
        e = self.evaluation
        hedge = "" if e.hedge is None else f" hedge {e.hedge:g}"
        return f"{self.kind}{hedge} {e.method}" if e.strategy else self.kind

    @property
    def made(self) -> str:
        """By which method, with which hedge."""
        e = self.evaluation
        hedge = None if e.hedge is None else f"hedge {e.hedge:g}"
        return ", ".join(filter(None, (e.method, hedge, "interpolated" if self.interpolated else None)))

    @property
    def mebibytes(self) -> float:
        """Size of all weight files."""
        return self.evaluation.bytes / MEBIBYTE

    def quality(self, name: str) -> Quality | None:
        """Scores on one distribution; None if it was not evaluated."""
        return self.evaluation.distributions.get(name)

    def divergence(self, role: Role) -> float | None:
        """Mean KL divergence over the known or the novel distributions; None if one was not measured."""
        values = [q.kl_divergence if (q := self.quality(name)) else None for name in self.names[role]]
        measured = [value for value in values if value is not None]
        return math.fsum(measured) / len(measured) if measured and len(measured) == len(values) else None


def make_rows(found: Artifacts) -> list[Row]:
    """All evaluations as rows: the original first, then ordered by size and divergence.

    Where none of ours has a uniform checkpoint of its size beside it, one is interpolated from its two neighbours.
    A distribution is known if an evaluated checkpoint was fitted on it or a summary says so, otherwise novel.
    """
    # evaluations with an adjustment have their own section, in which they are compared with those without it
    evaluations = [e for e in found.evaluations if e.adjustment is None]
    names = list(dict.fromkeys(name for e in evaluations for name in e.distributions))
    fitted = {name for e in evaluations for name in e.fitted_on}
    known = tuple(n for n in names if n in fitted or found.roles.get(n) == "known")
    roles: dict[Role, tuple[str, ...]] = {"known": known, "novel": tuple(n for n in names if n not in known)}
    proven = [proof.ours for proof in found.proofs]
    rows = [Row(e, roles, ours=e in proven or e.strategy == OURS) for e in evaluations]
    for row in [row for row in rows if row.ours]:
        rows += _uniform_of_its_size(row, rows)
    return sorted(rows, key=lambda row: (not row.original, row.evaluation.bytes, _rank(row), row.name))


def _uniform_of_its_size(row: Row, rows: Sequence[Row]) -> list[Row]:
    """A uniform checkpoint between the nearest smaller and larger one, if they exist and none has the size."""
    peers = [r for r in rows if r.evaluation.strategy == BASELINE and not r.ours and comparable(row, r)]
    around = [r.evaluation for r in sorted(peers, key=lambda r: r.evaluation.bytes) if not r.interpolated]
    size = row.evaluation.bytes
    smaller, larger = [e for e in around if e.bytes < size], [e for e in around if e.bytes > size]
    if any(same_size(row, peer) for peer in peers) or not smaller or not larger:
        return []
    low, high = smaller[-1], larger[0]
    if low.distributions.keys() != high.distributions.keys():
        return []
    return [Row(interpolated([low, high], size), row.names, interpolated=True)]


def comparable(one: Row, other: Row) -> bool:
    """Whether two checkpoints were made by the same method and measured on windows of the same length."""
    a, b = one.evaluation, other.evaluation
    return a.method == b.method and a.context == b.context


def size_groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Group checkpoints whose sizes differ by at most 0.5 %, smallest first; each group is ordered by divergence."""
    groups: list[list[Row]] = []
    for row in sorted((r for r in rows if not r.original), key=lambda r: r.evaluation.bytes):
        if groups and same_size(row, groups[-1][0]):
            groups[-1].append(row)
        else:
            groups.append([row])
    return [sorted(group, key=lambda row: (_rank(row), row.name)) for group in groups]


def same_size(one: Row, other: Row) -> bool:
    """Whether the sizes of two models differ by at most 0.5 %."""
    sizes = sorted((one.evaluation.bytes, other.evaluation.bytes))
    return sizes[1] - sizes[0] <= SAME_SIZE * sizes[0]


def best(values: Sequence[float | None]) -> set[int]:
    """Indices of the smallest value (several if equal); empty if there are no different values.

    >>> best([0.2, 0.1, None, 0.1])
    {1, 3}
    """
    measured = [value for value in values if value is not None]
    if len(set(measured)) < 2:
        return set()
    return {index for index, value in enumerate(values) if value == min(measured)}


def series(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Group checkpoints by name (strategy, hedge and method), ordered by size."""
    ordered = sorted(
        (r for r in rows if not (r.original or r.interpolated)), key=lambda r: (r.name, r.evaluation.bytes)
    )
    return [(name, list(group)) for name, group in groupby(ordered, key=lambda row: row.name)]


def _rank(row: Row) -> float:
    known, novel = map(row.divergence, ROLES)
    return novel if novel is not None else known if known is not None else math.inf
