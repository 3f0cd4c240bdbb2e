"""Drift: whether live text uses the experts that the known distributions use.

The routers choose experts for every token anyway, so watching only takes a few counters; the text itself is not used.
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
WINDOW = 256  # tokens in memory: docs/results/drift-detector.md
MIN_TOKENS = 96  # in memory, for a judgement; fewer are about as long as a phrase
INTERVAL = 64  # tokens between two judgements: one takes a third of the time of a small model's token
_DRIFTING = 0.75  # share of the threshold
_HYSTERESIS = 0.85  # a state is left only below this share of the divergence at which it is entered
_STEPS = 3  # of the mixture's fit, which continues from the last one
_TINY = 1e-30
_MIN_SHARE = 1e-6  # of an expert that a distribution does not use, and of a distribution in the mixture
# neighbouring tokens are routed alike: their noise is that of this many times fewer independent tokens (2.3 on the
# reference model's wiki)
_CORRELATION = 2.5


class DriftDetector:
    """Judges recent tokens by the experts that they were routed to.

    >>> detector = DriftDetector(Routing(fingerprint="", top_k=1, layers=(0,), known={"wiki": ((0.5, 0.5),)}))
    >>> detector.add(np.array([[60, 40]]))
    'known'
    >>> detector.add(np.array([[0, 300]]))
    'novel'

    The memory decays exponentially. Its routing is compared with the mixture of known distributions that fits it best,
    by the Jensen-Shannon divergence in bits, averaged over layers, minus the divergence that so few tokens would have
    by chance.

    Args:
        routing: of the known distributions.
        threshold: divergence in bits from which text is novel; it is drifting from three quarters of the threshold.
        window: number of tokens in memory.

    Raises:
        MoqaError: if a number is out of range.
    """

    def __init__(self, routing: Routing, threshold: float = DEFAULT_THRESHOLD, window: int = WINDOW) -> None:
        if not 0 < threshold < 1:
            raise MoqaError(f"drift threshold {threshold} is out of range", "give bits above 0 and below 1, e.g. 0.1")
        if window < MIN_TOKENS:
            raise MoqaError(f"a drift window of {window} tokens is too small", f"give {MIN_TOKENS} or more")
        self._known = padded(routing.known)
        self._basis = np.maximum(self._known, _MIN_SHARE)
        # [known distributions] shares of the mixture that fits recent tokens best
        self.mixture = np.full(len(self._known), 1 / len(self._known))
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
        """State of the recent tokens."""
        return STATES[self._level]

    @property
    def recent(self) -> np.ndarray:
        """[layers, experts] share of each expert in the routing of recent tokens; only after some were added."""
        return self._counts / np.maximum(self._counts.sum(1, keepdims=True), _MIN_SHARE)

    def add(self, counts: np.ndarray) -> State:
        """Add tokens.

        Args:
            counts: [layers, experts] number of these tokens that each expert received.

        Returns:
            The state after them; it is updated every 64 tokens.
        """
        self._fresh += counts
        tokens = int(self._fresh[0].sum()) / self._slots
        if tokens >= INTERVAL:
            self._remember(self._fresh, tokens)
            self._fresh.fill(0)
            if self._tokens >= MIN_TOKENS:
                self._judge()
        return self.state

    def distance(self, shares: np.ndarray) -> float:
        """Divergence of recent tokens from other [layers, experts] shares, as `divergence` is from the known ones."""
        return self._divergence(self.recent, np.maximum(shares, _MIN_SHARE))

    def _remember(self, counts: np.ndarray, tokens: float) -> None:
        kept = self._forget**tokens
        # a long prompt must not count for more than the memory holds
        gain = (1 - kept) / (1 - self._forget) / tokens
        self._counts *= kept
        self._counts += counts * gain
        self._tokens = self._tokens * kept + tokens * gain
        self._squares = self._squares * kept**2 + tokens * gain**2

    def _judge(self) -> None:
        recent = self.recent
        self.judgements += 1
        self._fit(recent)
        self.divergence = self._divergence(recent, np.tensordot(self.mixture, self._basis, 1))
        while self._level < 2 and self.divergence >= self._enter[self._level]:
            self._level += 1
        while self._level > 0 and self.divergence < self._enter[self._level - 1] * _HYSTERESIS:
            self._level -= 1

    def _fit(self, recent: np.ndarray) -> None:
        """Fit the most likely mixture by expectation-maximization."""
        if len(self._basis) == 1:
            return
        shares = np.maximum(self.mixture, _MIN_SHARE)
        basis, weights = self._basis.reshape(len(shares), -1), recent.reshape(-1) / len(recent)
        for _ in range(_STEPS):
            shares = shares * (basis @ (weights / (shares @ basis)))
        self.mixture = shares / shares.sum()

    def _divergence(self, recent: np.ndarray, other: np.ndarray) -> float:
        both = np.stack([recent + other, recent, other]).reshape(3, -1)
        # 0 log 0 is 0
        middle, *ends = (both * np.log2(both + _TINY)).sum(1).tolist()
        divergence = (sum(ends) - middle) / (2 * len(recent)) + 1
        # expected divergence of n independent draws from k classes, for large n: (k - 1) / 8n nats
        draws = self._tokens**2 / self._squares * self._slots / _CORRELATION
        noise = (recent.shape[1] - 1) / (8 * math.log(2) * draws)
        return max(0.0, divergence - noise)


def padded(known: Mapping[str, Sequence[Sequence[float]]]) -> np.ndarray:
    """[distributions, layers, largest number of experts] shares; an expert that a layer does not have gets 0."""
    most = max(len(layer) for shares in known.values() for layer in shares)
    return np.array([[[*layer, *[0.0] * (most - len(layer))] for layer in shares] for shares in known.values()])
