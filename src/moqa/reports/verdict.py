"""The verdict: one sentence that compares our checkpoint with the uniform one of the same size and method."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moqa.planning import STRATEGIES
from moqa.reports.rows import BASELINE, OURS, ROLES, Role, Row, comparable, same_size

EQUAL = 0.005  # relative changes below this count as equal

Outcome = Literal["win", "lose", "mixed", "equal", "open"]


@dataclass(frozen=True)
class Comparison:
    """One of our checkpoints compared with the uniform one of the same size and method.

    Attributes:
        ours: our checkpoint.
        baseline: the uniform one.
        changes: relative change of the mean KL divergence where it was measured, -0.4 for 40 % less.
    """

    ours: Row
    baseline: Row
    changes: dict[Role, float]

    @property
    def outcome(self) -> Outcome:
        """Which of the two has less divergence."""
        signs = {0 if abs(c) < EQUAL else math.copysign(1, c) for c in self.changes.values()}
        if not signs:
            return "open"
        if {1, -1} <= signs:
            return "mixed"
        return "win" if -1 in signs else "lose" if 1 in signs else "equal"


@dataclass(frozen=True)
class Verdict:
    """The first sentence of the page.

    Attributes:
        sentence: verdict on one pair.
        tally: result of the other pairs, and a baseline that is better, if any; may be empty.
        comparison: the pair; None if there is none.
    """

    sentence: str
    tally: str = ""
    comparison: Comparison | None = None

    @property
    def outcome(self) -> Outcome:
        """Which of the two has less divergence."""
        return self.comparison.outcome if self.comparison else "open"


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """Compare every checkpoint of ours with the uniform one of the same method that is nearest in size."""
    found = []
    for row in filter(lambda row: row.ours, rows):
        peers = [r for r in rows if r.evaluation.strategy == BASELINE and not r.ours and _like(row, r)]
        if peers:
            peer = min(peers, key=lambda r: abs(r.evaluation.bytes - row.evaluation.bytes))
            pairs = {role: (row.divergence(role), peer.divergence(role)) for role in ROLES}
            changes = {role: a / b - 1 for role, (a, b) in pairs.items() if a is not None and b}
            found.append(Comparison(row, peer, changes))
    return found


def verdict(rows: Sequence[Row]) -> Verdict:
    """Compare our checkpoint with its baseline in one sentence, which also says if ours loses or has no baseline.

    The pair is chosen independently of its result: `budget` with its default hedge, preferably a method that
    corrects errors instead of plain rounding, and the middle one of the sizes.
    """
    ours = [row for row in rows if row.ours]
    pairs = [c for c in comparisons(rows) if c.outcome != "open"]
    if pairs:
        chosen = _headline([c.ours for c in pairs])
        pair = next(c for c in pairs if c.ours is chosen)
        more = [_tally([c for c in pairs if _same_kind(c.ours, chosen)]), _still_better(chosen, rows)]
        return Verdict(_sentence(pair), " ".join(filter(None, more)), pair)
    if ours:
        row = _headline(ours)
        parts = [(role, value) for role in ROLES if (value := row.divergence(role)) is not None]
        measured = " and ".join(f"{value:.4f} nats on {role} texts" for role, value in parts)
        if not measured:
            return Verdict(f"{_label(row)} was evaluated without its divergence from the original.")
        return Verdict(
            f"{_label(row)}: KL divergence {measured}; no uniform {row.evaluation.method} checkpoint of the same size "
            "was evaluated, so nothing here says whether that is good."
        )
    if any(not row.original for row in rows):
        return Verdict(f"Only baselines were evaluated: there is no checkpoint of the strategy {OURS} to judge.")
    return Verdict("No checkpoint was evaluated yet: nothing here says how good a plan is.")


def _sentence(pair: Comparison) -> str:
    peer = pair.baseline.evaluation
    against = f"uniform {peer.method} ({peer.bits_per_weight:.2f} bits per weight)"
    size = "interpolated to the same size" if pair.baseline.interpolated else "of the same size"
    (role, change), *rest = pair.changes.items()
    but = ", but" if pair.outcome == "mixed" else ","
    loses = " loses" if pair.outcome == "lose" else ""
    text = f"{_label(pair.ours)}{loses}: KL divergence on {role} texts {_times(change)} {against} {size}"
    text += "".join(f"{but} on {role} texts {_times(change, alone=True)}" for role, change in rest)
    if pair.outcome == "mixed":
        worse = next(role for role, change in pair.changes.items() if change > 0)
        text += f": on {worse} texts ours loses"
    return text + "."


def _tally(pairs: Sequence[Comparison]) -> str:
    if len(pairs) < 2:
        return ""
    parts = []
    for role in ROLES:
        changes = [c.changes[role] for c in pairs if role in c.changes]
        if changes:
            better, worse = sum(c <= -EQUAL for c in changes), sum(c >= EQUAL for c in changes)
            counts = ((better, "better"), (len(changes) - better - worse, "equal"), (worse, "worse"))
            parts.append(f"on {role} texts {', '.join(f'{count} {word}' for count, word in counts if count)}")
    e = pairs[0].ours.evaluation
    of = f"{e.strategy}{'' if e.hedge is None else f' (hedge {e.hedge:g})'}"
    return f"All {len(pairs)} comparisons of {of} with uniform at the same size: {'; '.join(parts)}."


def _still_better(ours: Row, rows: Sequence[Row]) -> str:
    """Name a baseline other than uniform that beats ours at the same size and with the same method."""
    peers = [r for r in rows if not r.original and not r.ours and _like(ours, r)]
    found: dict[str, list[str]] = {}
    for role in ROLES:
        mine = ours.divergence(role)
        for peer in peers:
            its = peer.divergence(role)
            if peer.evaluation.strategy != BASELINE and mine and its is not None and its < mine * (1 - EQUAL):
                found.setdefault(peer.kind, []).append(role)
    return " ".join(f"At this size {name} is better on {' and '.join(roles)} texts." for name, roles in found.items())


def _headline(rows: Sequence[Row]) -> Row:
    def kind(row: Row) -> tuple[bool, float, bool]:
        e, usual = row.evaluation, STRATEGIES[OURS].hedge
        hedge = abs((e.hedge or 0.0) - usual(e.bits_per_weight)) if e.strategy == OURS and usual else 0.0
        return e.strategy != OURS, hedge, e.method == "rtn"

    first = min(kind(row) for row in rows)
    sizes = sorted((row for row in rows if kind(row) == first), key=lambda row: row.evaluation.bytes)
    return sizes[(len(sizes) - 1) // 2]


def _same_kind(one: Row, other: Row) -> bool:
    a, b = one.evaluation, other.evaluation
    return (a.strategy, a.hedge) == (b.strategy, b.hedge)


def _like(one: Row, other: Row) -> bool:
    return comparable(one, other) and same_size(one, other)


def _label(row: Row) -> str:
    e = row.evaluation
    return f"{e.strategy} {e.method} at {row.mebibytes:.2f} MiB"


def _times(change: float, alone: bool = False) -> str:
    if abs(change) < EQUAL:
        return "the same" if alone else "the same as"
    return f"{abs(change) * 100:.0f} % {'below' if change < 0 else 'above'}"
