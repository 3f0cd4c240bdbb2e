"""Who rounds while it trains, after every round: what each mode brings and takes is learned from the rounds so far."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moqa.federated.coarse import Limits, ModeOptions

_LEAST_SEEN = 10  # updates before times are predicted, and of each mode before gains are
_STRENGTH = 1.0  # of the ridge: features are of the order of 1
_FADES = 20.0  # rounds after which exploration has fallen to half


@dataclass(frozen=True)
class Observation:
    """What a client did in a round: its number, features, mode, gain as a share, and seconds over those predicted."""

    client: int
    features: tuple[float, ...]
    mode: int
    gain: float
    slowness: float


@dataclass
class FineAllocator:
    """Learns from rounds, and changes modes where that is expected to pay.

    >>> fine = FineAllocator(names=("ptq", "qat"), seed=0)
    >>> fine.observe([Observation(0, (0.3,), 0, 0.1, 1.0)])
    >>> len(fine.seen)
    1

    Attributes:
        names: of the modes.
        seed: of exploration.
        margin: by which a mode must be better than the present one, as a share; smaller differences are noise.
        patience: rounds in a row in which it must be, and rounds that a new mode is kept.
        explore: share of clients that try another mode in the first rounds; it fades.
    """

    names: tuple[str, ...]
    seed: int
    margin: float = 0.05
    patience: int = 2
    explore: float = 0.1
    seen: list[Observation] = field(default_factory=list)
    changed: dict[int, int] = field(default_factory=dict)
    _wanted: Counter[int] = field(default_factory=Counter)
    _trying: dict[int, int] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """All that was learned, as JSON."""
        return {
            "seen": [asdict(one) for one in self.seen], "changed": sorted(self.changed.items()),
            "wanted": sorted(self._wanted.items()), "trying": sorted(self._trying.items()),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.seen = [Observation(**one | {"features": tuple(one["features"])}) for one in state["seen"]]
        self.changed, self._trying = dict(state["changed"]), dict(state["trying"])
        self._wanted = Counter(dict(state["wanted"]))

    def observe(self, observations: list[Observation]) -> None:
        """Remember a round."""
        # rounding costs more or less from round to round for everyone: differences within a round tell modes apart
        mean = np.mean([one.gain for one in observations]) if observations else 0.0
        for one in observations:
            self.seen.append(Observation(one.client, one.features, one.mode, float(one.gain - mean), one.slowness))

    def propose(
        self, round_: int, clients: list[int], modes: NDArray[np.int64], features: NDArray[np.float64],
        options: ModeOptions, limits: Limits,
    ) -> tuple[NDArray[np.int64], list[str]]:  # fmt: skip
        """Modes of the next round, and a line for every change.

        Args:
            round_: that comes.
            clients: numbers of those that can take part.
            modes: [clients] of the last round.
            features: [clients, features] about 1 in size.
            options: as before the first round; their gains and seconds are corrected by what was seen.
            limits: of a round.
        """
        learned = self._learned(features, options)
        deadline = learned.deadline() if limits.seconds is None else limits.seconds
        best = learned.choose(Limits(deadline, limits.bytes))
        now, lines = modes.copy(), list[str]()
        # by round, not by what came before: a resumed run explores as the unbroken one
        tries = np.random.default_rng((self.seed, round_)).random((len(clients), 2))
        chance = self.explore * 0.5 ** (round_ / _FADES)
        for index, client in enumerate(clients):
            was = int(now[index])
            mode, why = self._trying.pop(client, was), "the trial is over"
            late = learned.seconds[index, mode] > deadline
            present, gain = learned.gains[index, [mode, best[index]]]
            if best[index] != mode and (late or gain > present * (1 + self.margin)):
                self._wanted[client] += 1
                if self._wanted[client] >= self.patience <= round_ - self.changed.get(client, -self.patience):
                    better = f"predicted to bring {gain / max(present, 1e-12) - 1:+.0%}, after {len(self.seen)} updates"
                    why = f"{learned.seconds[index, mode]:.3g} s are too long" if late else better
                    mode, self.changed[client] = int(best[index]), round_
                    del self._wanted[client]
            else:
                del self._wanted[client]
                others = np.flatnonzero((learned.seconds[index] <= deadline) & (np.arange(len(self.names)) != mode))
                if tries[index, 0] < chance and len(others):
                    self._trying[client], why = mode, "to see what it brings"
                    mode = int(others[int(tries[index, 1] * len(others))])
            if mode != was:
                old, new = learned.seconds[index, [was, mode]]
                names = f"{self.names[was]} -> {self.names[mode]}"
                lines.append(f"round {round_}: client {client} {names}: {why} ({old:.3g} -> {new:.3g} s)")
            now[index] = mode
        return now, lines

    def _learned(self, features: NDArray[np.float64], options: ModeOptions) -> ModeOptions:
        """Options with gains and seconds as a ridge regression of what was seen predicts them."""
        if len(self.seen) < _LEAST_SEEN:
            return options
        from sklearn.linear_model import Ridge

        modes = np.arange(len(self.names))
        rows = self._rows(np.array([one.features for one in self.seen]), np.array([one.mode for one in self.seen]))
        targets = np.array([[one.gain, np.log(max(one.slowness, 1e-6))] for one in self.seen])
        model = Ridge(alpha=_STRENGTH).fit(rows, targets)
        asked = self._rows(np.repeat(features, len(modes), 0), np.tile(modes, len(features)))
        found = model.predict(asked).reshape(len(features), len(modes), 2)
        # the regression speaks of differences within a round: they move the first guess, they do not replace it
        counts = Counter(one.mode for one in self.seen)
        known = all(counts[mode] >= _LEAST_SEEN for mode in range(len(self.names)))
        gains = options.gains * (np.clip(1 + found[..., 0] - found[..., 0].mean(), 0.1, 10.0) if known else 1.0)
        return ModeOptions(gains, options.seconds * np.exp(np.clip(found[..., 1], -3, 3)), options.sizes)

    def _rows(self, features: NDArray[np.float64], modes: NDArray[np.int64]) -> NDArray[np.float64]:
        chosen = np.eye(len(self.names))[modes]
        return np.concatenate([features, chosen, np.einsum("rm,rf->rmf", chosen, features).reshape(len(modes), -1)], 1)
