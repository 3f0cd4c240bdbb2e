"""What each mode brings and takes, as the rounds so far tell: a Gaussian process over clients, features and modes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moqa.federated.coarse import ModeOptions

# standard deviations of how far the first guess of what a mode keeps is off: for all clients alike, per unit of a
# feature, and for one client; and of what one round shows of it
_COMMON, _BY_FEATURE, _OWN, _NOISE = 0.3, 0.05, 0.05, 0.5
_LATEST = 500  # observations that count: rounding costs other than it did, and a fit takes the cube of their number
_LEAST, _MOST = 0.05, 2.0  # of a client's progress that a mode is taken to keep


@dataclass(frozen=True)
class Observation:
    """What a client did in a round.

    Attributes:
        client: its number.
        features: as `features_of` has them.
        mode: index.
        gain: of its trained model by rounding, as `gain_of` has it: below 0 where rounding costs.
        slowness: seconds over those predicted.
        expected: share of a client's progress that the mode was to keep by the first guess.
    """

    client: int
    features: tuple[float, ...]
    mode: int
    gain: float
    slowness: float
    expected: float = 1.0


@dataclass(frozen=True)
class Learned:
    """What modes bring and take by now.

    Attributes:
        options: gains and seconds, corrected by what was seen.
        doubts: [clients, modes] standard deviation of a mode's gain less that of the present mode.
        noise: [clients] standard deviation of what one round shows of a gain.
    """

    options: ModeOptions
    doubts: NDArray[np.float64]
    noise: NDArray[np.float64]

    def worth(self, present: NDArray[np.int64], margin: float) -> NDArray[np.float64]:
        """[clients, modes] gain in every later round that is expected of trying a mode for one.

        A trial moves the difference to the present mode by a normal number, and the mode changes only if that is above
        the margin then: the knowledge gradient of two arms (Frazier, Powell, Dayanik, SIAM J. Control Optim. 2008).
        """
        from scipy.special import ndtr

        now = np.take_along_axis(self.options.gains, present[:, None], 1)
        moves = np.maximum(self.doubts**2 / np.hypot(self.doubts, self.noise[:, None]), 1e-12)
        ahead = (self.options.gains - now * (1 + margin)) / moves
        found: NDArray[np.float64] = moves * (np.exp(-(ahead**2) / 2) / np.sqrt(2 * np.pi) + ahead * ndtr(ahead))
        return found


def learned(
    seen: Sequence[Observation], clients: Sequence[int], features: NDArray[np.float64], options: ModeOptions,
    present: NDArray[np.int64],
) -> Learned:  # fmt: skip
    """Options as they are expected to be by now.

    >>> options = ModeOptions(np.ones((1, 2)), np.ones((1, 2)), np.ones((1, 2), np.int64))
    >>> seen = [Observation(0, (0.0,), 0, -1.0, 1.0)]
    >>> learned(seen, [0], np.zeros((1, 1)), options, np.array([0])).options.gains.round(2)
    array([[0.73, 1.  ]])

    Args:
        seen: with gains beyond the first guess and beyond the mean of their round, as `FineAllocator` keeps them.
        clients: numbers of those that are asked about.
        features: [clients, features] about 1 in size.
        options: as before the first round.
        present: [clients] modes.
    """
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import DotProduct
    from threadpoolctl import threadpool_limits

    places = {client: index for index, client in enumerate(clients)}
    count, modes = options.gains.shape
    rows = _rows(np.repeat(np.arange(count), modes), np.repeat(features, modes, 0), np.tile(np.arange(modes), count),
                 (count, modes)).reshape(count, modes, -1)  # fmt: skip
    model = GaussianProcessRegressor(DotProduct(0.0, "fixed"), alpha=_NOISE**2, optimizer=None, n_targets=2)
    latest = seen[-_LATEST:]
    # rows are linear in what is asked: the row of a difference is the difference of rows
    apart = rows - np.take_along_axis(rows, present[:, None, None], 1)
    # a matrix of 200 rows takes a millisecond, and half a second with threads that wait for a busy machine
    with threadpool_limits(1, user_api="blas"):
        if latest:
            model.fit(
                _rows(
                    np.array([places.get(one.client, -1) for one in latest]),
                    np.array([one.features for one in latest]), np.array([one.mode for one in latest]), (count, modes),
                ),
                np.array([[one.gain, np.log(max(one.slowness, 1e-6))] for one in latest]),
            )  # fmt: skip
        found = model.predict(rows.reshape(count * modes, -1)).reshape(count, modes, 2)
        _, doubts = model.predict(apart.reshape(count * modes, -1), return_std=True)
    most = options.gains.max(1, keepdims=True)
    kept = np.clip(options.gains / most + found[..., 0], _LEAST, _MOST)
    seconds = options.seconds * np.exp(np.clip(found[..., 1], -3, 3))
    return Learned(
        ModeOptions(most * kept, seconds, options.sizes), most * doubts[:, 0].reshape(count, modes), most[:, 0] * _NOISE
    )


def _rows(
    places: NDArray[np.int64], features: NDArray[np.float64], modes: NDArray[np.int64], shape: tuple[int, int]
) -> NDArray[np.float64]:
    """[observations, columns] a column for each mode, for each mode and feature, and for each mode and client."""
    clients, kinds = shape
    chosen = np.eye(kinds)[modes]
    own = (places[:, None] == np.arange(clients)) * _OWN
    parts = np.concatenate([np.full((len(modes), 1), _COMMON), features * _BY_FEATURE, own], 1)
    return np.einsum("rm,rp->rmp", chosen, parts).reshape(len(modes), -1)
