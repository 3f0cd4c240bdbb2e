"""Memory of the parts of a model and of the work on them, so that a process stays within its limit."""

from collections import Counter
from collections.abc import Sequence
from math import prod

from moqa.calibration.inputs import LOOKUP_TOKENS, by_input
from moqa.calibration.routed import GATHERED_ROWS
from moqa.calibration.stacks import STACK_WEIGHTS
from moqa.errors import LittleMemoryError
from moqa.memory.limit import MemoryLimit
from moqa.memory.process import resident
from moqa.models.slopes import COMBINED
from moqa.models.units import Unit
from moqa.models.view import ModelView

# solving a stack of matrices needs float32 copies of it, and float64 copies of one of its Gram matrices
_COPIES, _GRAM_COPIES = 10, 3
# Gram matrices of outputs and their factors
_OUTPUT_COPIES = 3
# factor for the freed memory that the C library keeps
SLACK = 1.08
# bytes of threads and libraries once they compute: compiled products, buffers
COMPUTING = 48 * 2**20
# the same after backward passes, solving, and reading the tokenizer of a checkpoint
_COMPUTING_LATE = 128 * 2**20
# copies of the outputs of all experts for a batch
_OUTPUTS = 4


class Footprint:
    """Bytes of the parts of a model; for blocks, those of the largest.

    >>> Footprint(view).layer
    13369344

    Args:
        view: the model, in a process that returns unused memory (`moqa.memory.process.settle`).

    Attributes:
        base: resident memory of the process now.
        ends: the embedding and the head in the dtype of the computation.
        logits: of a batch, with the copies for their gradient.
        layer: the units of a block in memory.
        weights: number of weights in them.
        batch: hidden states and outputs of a batch in a block.
        linear: statistics of the inputs of units that are not experts.
        expert: statistics of one expert's inputs.
        slopes: statistics of its activation.
        unit: number of weights of the largest unit.
        spaces: for each kind of input space: weights of its units, features, weights of the Gram matrices of their
            outputs, and number of such spaces in a block.
        features: of the largest input.
        experts: number of experts in a block.
        hidden: features of a token between two blocks.
    """

    def __init__(self, view: ModelView) -> None:
        self.base, self.ends, self.hidden = resident(), view.ends_bytes(), view.stream
        self.logits = 4 * 4 * view.task.batch_size * view.classes
        self.batch = view.task.batch_size * view.stream * 4 * (_OUTPUTS * max(view.top_k, 1) + 8)
        self.unit = max(unit.weights for unit in view.units.values())
        self.features = max(unit.shape[1] for unit in view.units.values())
        self.layer = self.weights = self.linear = self.expert = self.slopes = self.experts = 0
        self.spaces: set[tuple[int, int, int, int]] = set()
        for index in range(len(view.blocks)):
            units = view.block_units(index)
            self.layer = max(self.layer, sum(unit.weights * view.itemsize(unit) for unit in units))
            self.weights = max(self.weights, sum(unit.weights for unit in units))
            spaces = list(by_input(units).values())
            routed = [sharing for sharing in spaces if sharing[0].expert is not None]
            dense = [sharing for sharing in spaces if sharing[0].expert is None]
            count = len({unit.expert for unit in units if unit.expert is not None})
            self.expert = max(self.expert, _gram_bytes(routed) // max(count, 1))
            self.slopes = max(self.slopes, max(map(_slopes_bytes, routed), default=0))
            self.linear = max(self.linear, _gram_bytes(dense) + sum(map(_slopes_bytes, dense)))
            shapes = Counter((tuple(unit.shape for unit in sharing), _outputs(sharing)) for sharing in spaces)
            self.spaces |= {
                (sum(map(prod, shape)), shape[0][1], outputs, count) for (shape, outputs), count in shapes.items()
            }
            self.experts = max(self.experts, count)

    @property
    def reading_ends(self) -> int:
        """Peak while the ends are read."""
        # half as much again, because the stored and the converted ends are in memory together
        return self.base + self.ends * 3 // 2

    def summing(self, tokens: int) -> int:
        """Additional bytes while an expert's inputs are gathered and their statistics are computed."""
        return 4 * self.hidden * (min(tokens, LOOKUP_TOKENS) + 4 * min(tokens, GATHERED_ROWS))

    def comparing(self, packed: int, tokens: int) -> int:
        """Peak while a checkpoint's predictions are compared with the original's.

        The checkpoint is mapped, hidden states of all tokens wait at a block of both models, and either one block is
        unpacked or there are six copies of the predictions of a batch.
        """
        waiting = 2 * 4 * self.hidden * tokens
        at_work = max(4 * self.weights + self.batch, self.logits * 3 // 2)
        return self.base + _COMPUTING_LATE + self.ends + packed + waiting + at_work

    def solving(self, copies: int = 1, by_outputs: bool = False) -> int:
        """Additional bytes while a method solves one stack, with `copies` of each matrix."""
        sizes = []
        for weights, features, outputs, count in self.spaces:
            entries = min(count, max(1, STACK_WEIGHTS // (copies * weights)))
            stack = 4 * entries * (_COPIES * copies * weights + (_OUTPUT_COPIES * outputs if by_outputs else 0))
            sizes.append(stack + (4 * entries + 8 * _GRAM_COPIES) * features**2)
        return max(sizes)


def _gram_bytes(spaces: Sequence[Sequence[Unit]]) -> int:
    """Bytes of one Gram matrix for each input space."""
    return sum(4 * sharing[0].shape[1] ** 2 for sharing in spaces)


def _slopes_bytes(sharing: Sequence[Unit]) -> int:
    """Bytes of the Gram matrices of an activation's slopes for the outputs of some units."""
    return sum(4 * unit.shape[0] ** 2 for unit in sharing if unit.role != "attention" and unit.projection in COMBINED)


def _outputs(sharing: Sequence[Unit]) -> int:
    """Weights of the Gram matrices of gradients at the outputs of some units."""
    return sum(unit.shape[0] ** 2 for unit in sharing if unit.projection in (*COMBINED, "down_proj"))


def as_many(memory: MemoryLimit, fixed: int, each: int, count: int, least: int) -> int:
    """How many of `count` things of `each` bytes fit, in addition to `fixed` bytes.

    Raises:
        LittleMemoryError: if not even one fits.
    """
    smallest = int(max(fixed + each, least) * SLACK)
    if memory.limit < smallest:
        raise LittleMemoryError(f"{memory} cannot hold one block of this model", smallest)
    return max(1, min(count, int(memory.limit / SLACK - fixed) // max(each, 1)))
