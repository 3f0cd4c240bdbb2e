"""Drift: whether the experts that live text uses are those that the known distributions use.

The routers decide it for every token anyway, so watching costs a few counters; no text is looked at.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from moqa.errors import MoqaError
from moqa.format.routing import Routing

State = Literal["known", "drifting", "novel"]
STATES: tuple[State, ...] = ("known", "drifting", "novel")

DEFAULT_THRESHOLD = 0.1  # bits
WINDOW = 256  # tokens of memory: docs/results/drift-detector.md
FEWEST = 96  # tokens in memory; a judgement on fewer is one on a phrase
EVERY = 64  # tokens between two judgements: one takes a third of the time of a small model's token
_DRIFTING = 0.75  # of the threshold
_BACK = 0.85  # a state is left for a calmer one only this far below the divergence at which it is entered
_STEPS = 3  # of the mixture's fit, which goes on from the last one
_TINY = 1e-30
_LEAST = 1e-6  # share of an expert that a distribution does not use, and of a distribution in the mixture
# neighbouring tokens are routed alike: as much noise as of so many times fewer independent ones (2.3 on the reference
# model's wiki)
_CLUMPING = 2.5


class DriftDetector:
    """Judges recent tokens by the experts that they were routed to.

    >>> detector = DriftDetector(read_routing("runs/out", fingerprint))
    >>> detector.add(counts.take())
    >>> detector.state, round(detector.divergence, 3)
    ('known', 0.012)

    The memory forgets exponentially. Its routing is compared with the mixture of known distributions that fits it best,
    by the Jensen-Shannon divergence in bits, averaged over layers, less what so few tokens would give by chance.

    Args:
        routing: of the known distributions.
        threshold: divergence from which text is novel, in bits; from three quarters of it on it is drifting.
        window: tokens that the memory holds.

    Raises:
        MoqaError: if a number is out of its range.
    """

    def __init__(self, routing: Routing, threshold: float = DEFAULT_THRESHOLD, window: int = WINDOW) -> None:
        if not 0 < threshold < 1:
            raise MoqaError(f"a drift threshold of {threshold}", "it is in bits, above 0 and below 1, e.g. 0.1")
        if window < FEWEST:
            raise MoqaError(f"a drift window of {window} tokens", f"give {FEWEST} or more")
        self._known = padded(routing.known)
        self._basis = np.maximum(self._known, _LEAST)
        self._mixture = np.full(len(self._known), 1 / len(self._known))
        self._slots = routing.top_k
        self._forget = math.exp(-1 / window)
        self.threshold = threshold
        self._enter = _DRIFTING * threshold, threshold
        self._fresh = np.zeros(self._known.shape[1:], np.int64)  # not yet judged
        self._counts = np.zeros(self._known.shape[1:])
        self._tokens = self._squares = 0.0
        self._level = 0
        self.divergence = 0.0
        self.judgements = 0  # so far

    @property
    def state(self) -> State:
        """What recent tokens are."""
        return STATES[self._level]

    @property
    def mixture(self) -> np.ndarray:
        """[known distributions] shares of the mixture that fits recent tokens best."""
        return self._mixture

    @property
    def recent(self) -> np.ndarray:
        """[layers, experts] share of recent tokens' routing that each expert has; only after some were added."""
        return self._counts / np.maximum(self._counts.sum(1, keepdims=True), _LEAST)

    def add(self, counts: np.ndarray) -> State:
        """Take further tokens into account.

        Args:
            counts: [layers, experts] how many of them each expert got.

        Returns:
            The state after them; it is judged every 64 tokens.
        """
        self._fresh += counts
        tokens = int(self._fresh[0].sum()) / self._slots
        if tokens >= EVERY:
            self._remember(self._fresh, tokens)
            self._fresh.fill(0)
            if self._tokens >= FEWEST:
                self._judge()
        return self.state

    def distance(self, shares: np.ndarray) -> float:
        """Divergence of recent tokens from other [layers, experts] shares, as `divergence` is from the known ones."""
        return self._divergence(self.recent, np.maximum(shares, _LEAST))

    def _remember(self, counts: np.ndarray, tokens: float) -> None:
        kept = self._forget**tokens
        # a long prompt counts for no more than the memory holds
        gain = (1 - kept) / (1 - self._forget) / tokens
        self._counts *= kept
        self._counts += counts * gain
        self._tokens = self._tokens * kept + tokens * gain
        self._squares = self._squares * kept**2 + tokens * gain**2

    def _judge(self) -> None:
        recent = self.recent
        self.judgements += 1
        self._fit(recent)
        self.divergence = self._divergence(recent, np.tensordot(self._mixture, self._basis, 1))
        while self._level < 2 and self.divergence >= self._enter[self._level]:
            self._level += 1
        while self._level > 0 and self.divergence < self._enter[self._level - 1] * _BACK:
            self._level -= 1

    def _fit(self, recent: np.ndarray) -> None:
        """The likeliest mixture, by expectation and maximization."""
        if len(self._basis) == 1:
            return
        shares = np.maximum(self._mixture, _LEAST)
        basis, weights = self._basis.reshape(len(shares), -1), recent.reshape(-1) / len(recent)
        for _ in range(_STEPS):
            shares = shares * (basis @ (weights / (shares @ basis)))
        self._mixture = shares / shares.sum()

    def _divergence(self, recent: np.ndarray, other: np.ndarray) -> float:
        both = np.stack([recent + other, recent, other]).reshape(3, -1)
        # 0 log 0 is 0
        middle, *ends = (both * np.log2(both + _TINY)).sum(1).tolist()
        found = (sum(ends) - middle) / (2 * len(recent)) + 1
        # of n independent draws from k kinds, in the limit of many: (k - 1) / 8n nats
        draws = self._tokens**2 / self._squares * self._slots / _CLUMPING
        noise = (recent.shape[1] - 1) / (8 * math.log(2) * draws)
        return max(0.0, found - noise)


def padded(known: Mapping[str, Sequence[Sequence[float]]]) -> np.ndarray:
    """[distributions, layers, most experts] shares; an expert that a layer does not have gets 0."""
    most = max(len(layer) for shares in known.values() for layer in shares)
    return np.array([[[*layer, *[0.0] * (most - len(layer))] for layer in shares] for shares in known.values()])
