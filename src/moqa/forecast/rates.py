"""Rates: seconds of the work on one block of each kind, measured by a trial."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moqa.models.view import ModelView


@dataclass(frozen=True)
class TokenCost:
    """Seconds of a piece of work, linear in the number of tokens.

    >>> TokenCost(fixed=0.5, token=0.25).of(10)
    3.0

    Attributes:
        fixed: seconds independent of the number of tokens.
        token: seconds per token.
    """

    fixed: float = 0.0
    token: float = 0.0

    @classmethod
    def through(cls, few: tuple[int, float], many: tuple[int, float]) -> "TokenCost":
        """The line through two measurements of (tokens, seconds).

        >>> TokenCost.through((100, 1.5), (200, 2.5))
        TokenCost(fixed=0.5, token=0.01)
        """
        token = (many[1] - few[1]) / (many[0] - few[0]) if many[0] > few[0] else 0.0
        fixed = many[1] - token * many[0]
        # only noise can make a part negative: then use the larger measurement alone
        if token < 0 or fixed < 0 or many[0] <= few[0]:
            return cls(0.0, max(many[1], 0.0) / many[0])
        return cls(fixed, token)

    def of(self, tokens: float) -> float:
        """Seconds for a number of tokens."""
        return self.fixed + self.token * tokens


@dataclass
class BlockRates:
    """All rates of one kind of block, filled in by the trials of each step; seconds if no unit is given.

    Tokens are those of all samples in a quantization, and those of one distribution in a profile.

    Attributes:
        experts: number of experts.
        bytes: of the original block.
        read: reading it, possibly from the page cache.
        read_work: processor seconds of reading it.
        written: bytes of the quantized block.
        write: writing it.
        write_work: processor seconds of writing it.
        inputs: running the original block, with statistics of the inputs of units that are not experts.
        calls: reading the calls of the experts, for each slice of experts.
        expert: statistics of one expert's inputs.
        linear: solving the units that are not experts.
        solve: solving one expert's units.
        advance: running the quantized block and saving its outputs.
        weights: statistics of the weights alone, for a profile.
        forward: the forward pass of a profile.
        back: its backward pass, with the sensitivity of units that are not experts.
        back_slice: another backward pass, for another slice of experts.
        back_expert: making and measuring one expert's errors.
        step: one decoding step of all windows that the model writes itself.
        original: running the original block, to compare a checkpoint with it.
        packed: running the quantized block with the reference kernels, for that comparison.
    """

    experts: int = 0
    bytes: int = 0
    read: float = 0.0
    read_work: float = 0.0
    written: int = 0
    write: float = 0.0
    write_work: float = 0.0
    inputs: TokenCost = TokenCost()
    calls: TokenCost = TokenCost()
    expert: TokenCost = TokenCost()
    linear: float = 0.0
    solve: float = 0.0
    advance: TokenCost = TokenCost()
    weights: float = 0.0
    forward: TokenCost = TokenCost()
    back: TokenCost = TokenCost()
    back_slice: TokenCost = TokenCost()
    back_expert: TokenCost = TokenCost()
    step: float = 0.0
    original: TokenCost = TokenCost()
    packed: TokenCost = TokenCost()


@dataclass(frozen=True)
class Rates:
    """Everything that a trial measured; seconds if no unit is given.

    Attributes:
        layers: for each block, the index of the first block of its kind.
        blocks: first block of each kind -> its rates.
        storage: bytes per second of reading the original's files.
        cores: number of cores that share background work.
        once: additional time of work that is done for the first time.
        ends: reading the embedding and the head.
        embed: embedding samples.
        labels: drawing labels from the model, and their gradients.
        step: one decoding step of all windows that the model writes itself, outside the blocks.
        score: comparing a checkpoint's predictions with the original's.
        checkpoint: opening a checkpoint for that comparison.
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
        """Rates of all blocks, in order."""
        return [self.blocks[first] for first in self.layers]

    def loaded(self) -> "Rates":
        """The same with the whole original in memory: nothing is read."""
        blocks = {first: replace(block, bytes=0, read=0.0) for first, block in self.blocks.items()}
        return replace(self, blocks=blocks, ends=0.0)


def block_kinds(view: ModelView) -> tuple[int, ...]:
    """For each block, the index of the first block with the same kinds of units: their roles, shapes and dtypes.

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
