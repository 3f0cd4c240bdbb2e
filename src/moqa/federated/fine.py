"""Who rounds while it trains, after every round: modes change where that pays by what was seen so far."""

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moqa.federated.coarse import Limits, ModeOptions
from moqa.federated.learned import Learned, Observation, learned

_REST = 3  # rounds from one trial to the next


@dataclass
class FineAllocator:
    """Learns from rounds, and changes modes where that is expected to pay.

    >>> fine = FineAllocator(names=("ptq", "qat"))
    >>> fine.observe([Observation(0, (0.3,), 0, 0.1, 1.0)])
    >>> len(fine.seen)
    1

    Attributes:
        names: of the modes.
        margin: by which a mode must be better than the present one, as a share; smaller differences are noise.
        firm: by which another deadline must bring more per second.
        patience: rounds in a row in which a mode must be, and rounds that a new mode is kept.
    """

    names: tuple[str, ...]
    margin: float = 0.05
    firm: float = 0.1
    patience: int = 2
    seen: list[Observation] = field(default_factory=list)
    changed: dict[int, int] = field(default_factory=dict)
    _wanted: Counter[int] = field(default_factory=Counter)
    _trying: dict[int, int] = field(default_factory=dict)
    _tried: int = -_REST
    _deadline: float | None = None

    def state(self) -> dict[str, Any]:
        """All that was learned, as JSON."""
        return {
            "seen": [asdict(one) for one in self.seen], "changed": sorted(self.changed.items()),
            "wanted": sorted(self._wanted.items()), "trying": sorted(self._trying.items()), "tried": self._tried,
            "deadline": self._deadline,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.seen = [Observation(**one | {"features": tuple(one["features"])}) for one in state["seen"]]
        self.changed, self._trying = dict(state["changed"]), dict(state["trying"])
        self._wanted, self._tried = Counter(dict(state["wanted"])), state["tried"]
        self._deadline = state["deadline"]

    def observe(self, observations: list[Observation]) -> None:
        """Remember a round."""
        # rounding costs more or less from round to round for everyone: differences within a round tell modes apart
        beyond = [one.gain - one.expected for one in observations]
        mean = float(np.mean(beyond)) if beyond else 0.0
        self.seen += [replace(one, gain=each - mean) for one, each in zip(observations, beyond, strict=True)]

    def propose(
        self, round_: int, clients: list[int], modes: NDArray[np.int64], features: NDArray[np.float64],
        options: ModeOptions, limits: Limits, *, rounds: int | None = None,
    ) -> tuple[NDArray[np.int64], list[str]]:  # fmt: skip
        """Modes of the next round, and a line for every change.

        Args:
            round_: that comes.
            clients: numbers of those that can take part.
            modes: [clients] of the last round.
            features: [clients, features] about 1 in size.
            options: as before the first round; their gains and seconds are corrected by what was seen.
            limits: of a round.
            rounds: in all; None if nobody knows.
        """
        back = {client: self._trying.pop(client) for client in clients if client in self._trying}
        now = np.array([back.get(client, int(mode)) for client, mode in zip(clients, modes, strict=True)], np.int64)
        known = learned(self.seen, clients, features, options, now)
        left = 0 if rounds is None else rounds - round_ + 1
        deadline = self._deadline_of(options, known.options, limits)
        best = known.options.choose(Limits(deadline, limits.bytes))
        reasons = dict.fromkeys(back, "the trial is over")
        for index, client in enumerate(clients):
            late = known.options.seconds[index, now[index]] > deadline * (1 + self.margin)
            present, gain = known.options.gains[index, [now[index], best[index]]]
            if best[index] == now[index] or not (late or gain > present * (1 + self.margin)):
                del self._wanted[client]
                continue
            self._wanted[client] += 1
            if self._wanted[client] >= self.patience <= round_ - self.changed.get(client, -self.patience):
                why = f"predicted to bring {gain / max(present, 1e-12) - 1:+.0%}, after {len(self.seen)} updates"
                if late:
                    why = f"{known.options.seconds[index, now[index]]:.3g} s are too long"
                reasons[client], now[index], self.changed[client] = why, best[index], round_
                del self._wanted[client]
        settled = np.array([client not in reasons and not self._wanted[client] for client in clients])
        tried = self._trial(left, settled, now, known, Limits(deadline, limits.bytes))
        if tried is not None and round_ - self._tried >= _REST:
            index, mode = tried
            self._trying[clients[index]], self._tried = int(now[index]), round_
            reasons[clients[index]], now[index] = "to see what it brings", mode
        seconds = known.options.seconds
        return now, [
            f"round {round_}: client {client} {self.names[was]} -> {self.names[mode]}: {reasons[client]} "
            f"({seconds[index, was]:.3g} -> {seconds[index, mode]:.3g} s)"
            for index, (client, was, mode) in enumerate(zip(clients, modes.tolist(), now.tolist(), strict=True))
            if was != mode
        ]

    def _trial(
        self, left: int, settled: NDArray[np.bool_], now: NDArray[np.int64], known: Learned, limits: Limits
    ) -> tuple[int, int] | None:
        """The client and mode whose trial costs least of those that are expected to bring more than they cost."""
        options, here = known.options, np.arange(len(now))
        costs = np.maximum(options.gains[here, now][:, None] - options.gains, 0.0)
        more = options.sizes - options.sizes[here, now][:, None]
        free = np.inf if limits.bytes is None else limits.bytes - options.sizes[here, now].sum()
        allowed = settled[:, None] & (options.seconds <= (limits.seconds or np.inf)) & (more <= free)
        allowed[here, now] = False
        pays = allowed & (known.worth(now, self.margin) * (left - 1) > costs)
        if not pays.any():
            return None
        index, mode = divmod(int(np.where(pays, costs, np.inf).argmin()), len(self.names))
        return index, mode

    def _deadline_of(self, first: ModeOptions, now: ModeOptions, limits: Limits) -> float:
        """The given one, or the one with the most progress per second; it stays where another is hardly better."""
        if limits.seconds is not None:
            return limits.seconds
        if self._deadline is None:
            self._deadline = first.deadline()
        other = now.deadline()
        if now.rate(other) > now.rate(self._deadline) * (1 + self.firm):
            self._deadline = other
        return self._deadline
