"""Rates: seconds of the work on one decoder layer of each kind, as a trial measured them."""

from collections.abc import Mapping
from dataclasses import dataclass

from moqa.models.view import ModelView


@dataclass(frozen=True)
class TokenCost:
    """Seconds of a piece of work on some tokens.

    >>> TokenCost(fixed=0.5, token=0.001).of(1024)
    1.524

    Attributes:
        fixed: whatever the number of tokens is.
        token: for each of them.
    """

    fixed: float = 0.0
    token: float = 0.0

    @classmethod
    def through(cls, few: tuple[int, float], many: tuple[int, float]) -> "TokenCost":
        """The cost that two measurements, (tokens, seconds) each, lie on.

        >>> TokenCost.through((100, 1.5), (200, 2.5))
        TokenCost(fixed=0.5, token=0.01)
        """
        token = (many[1] - few[1]) / (many[0] - few[0]) if many[0] > few[0] else 0.0
        fixed = many[1] - token * many[0]
        # neither part is negative but for the noise of a clock: then the larger measurement tells more
        if token < 0 or fixed < 0 or many[0] <= few[0]:
            return cls(0.0, max(many[1], 0.0) / many[0])
        return cls(fixed, token)

    def of(self, tokens: float) -> float:
        """Seconds for so many tokens."""
        return self.fixed + self.token * tokens


@dataclass(frozen=True)
class QuantizationRates:
    """Seconds of quantizing a decoder layer; tokens are those of all samples.

    Attributes:
        inputs: running the original layer, with statistics of the inputs of units that are no experts.
        calls: reading what the experts were called with, for each slice of them.
        expert: statistics of one expert's inputs.
        linear: solving the units that are no experts.
        solve: solving one expert's units.
        advance: running the quantized layer, and putting its outputs on the disk.
    """

    inputs: TokenCost = TokenCost()
    calls: TokenCost = TokenCost()
    expert: TokenCost = TokenCost()
    linear: float = 0.0
    solve: float = 0.0
    advance: TokenCost = TokenCost()


@dataclass(frozen=True)
class ProfileRates:
    """Seconds of profiling a decoder layer; tokens are those of one distribution.

    Attributes:
        weights: what the weights alone tell.
        forward: the pass forward.
        back: the pass back, with the sensitivity of units that are no experts.
        back_slice: going back once more, for another slice of the experts.
        back_expert: making one expert's errors and measuring them.
        step: of one token for each window that the model writes itself.
    """

    weights: float = 0.0
    forward: TokenCost = TokenCost()
    back: TokenCost = TokenCost()
    back_slice: TokenCost = TokenCost()
    back_expert: TokenCost = TokenCost()
    step: float = 0.0


@dataclass(frozen=True)
class ComparisonRates:
    """Seconds of running a decoder layer for a comparison with the original.

    Attributes:
        original: as it was.
        packed: with the reference kernels.
    """

    original: TokenCost = TokenCost()
    packed: TokenCost = TokenCost()


@dataclass(frozen=True)
class FileRates:
    """Reading an original decoder layer and writing a quantized one.

    Attributes:
        bytes: of the original.
        read: seconds, where the system has the file in its memory or is as fast as its storage.
        read_work: seconds of one core in that.
        written: bytes of the quantized layer.
        write: seconds.
        write_work: seconds of one core in that.
    """

    bytes: int = 0
    read: float = 0.0
    read_work: float = 0.0
    written: int = 0
    write: float = 0.0
    write_work: float = 0.0


@dataclass(frozen=True)
class BlockRates:
    """Everything that was measured of one kind of decoder layer, `experts` of them in it."""

    experts: int = 0
    file: FileRates = FileRates()
    quantization: QuantizationRates = QuantizationRates()
    profile: ProfileRates = ProfileRates()
    comparison: ComparisonRates = ComparisonRates()


@dataclass(frozen=True)
class Rates:
    """Everything that a trial measured.

    Attributes:
        layers: of each decoder layer, the first one of its kind.
        blocks: first layer of each kind -> its rates.
        storage: bytes per second that are read of the original's files.
        cores: that share work which can be done beside other work.
        once: seconds that work takes more when it is done for the first time.
        ends: seconds of reading the embedding and the head.
        embed: embedding samples.
        labels: drawing labels from the model, and their gradients.
        step: of one token for each window that the model writes itself, outside the decoder layers.
        score: comparing a checkpoint's predictions with the original's.
        checkpoint: opening a checkpoint for that.
    """

    layers: tuple[int, ...]
    blocks: Mapping[int, BlockRates]
    storage: float
    cores: int = 1
    once: float = 0.0
    ends: float = 0.0
    embed: TokenCost = TokenCost()
    labels: TokenCost = TokenCost()
    step: float = 0.0
    score: TokenCost = TokenCost()
    checkpoint: float = 0.0

    def each(self) -> list[BlockRates]:
        """Rates of all decoder layers, in order."""
        return [self.blocks[first] for first in self.layers]


def block_kinds(view: ModelView) -> tuple[int, ...]:
    """Of each decoder layer the first one of its kind, which has units of the same shapes and dtypes.

    >>> block_kinds(view)
    (0, 0, 0, 0, 0, 0)
    """
    first: dict[tuple, int] = {}
    kinds = []
    for layer in range(len(view.blocks)):
        key = tuple(
            (unit.role, unit.projection, unit.shape, view.stored_dtype(unit)) for unit in view.block_units(layer)
        )
        kinds.append(first.setdefault(key, layer))
    return tuple(kinds)
