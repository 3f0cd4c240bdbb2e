"""What is worked on at a time, so that a process stays within its memory."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from moqa.calibration.inputs import TOGETHER, by_input
from moqa.calibration.routed import ROWS
from moqa.calibration.stacks import STACK_WEIGHTS
from moqa.errors import LittleMemoryError
from moqa.memory.limit import MemoryLimit
from moqa.memory.process import resident
from moqa.models.units import Unit
from moqa.models.view import ModelView

# float32 copies of a stack of matrices that solving it takes, and beside the factors of all its inputs' statistics
# float64 copies of one
_COPIES, _SQUARES = 10, 3
# what the C library keeps of small blocks, as a factor
SLACK = 1.08
# what threads and libraries take once they compute: compiled products, buffers
COMPUTING = 48 * 2**20
# the same once they have also gone back through layers, solved them, and read a checkpoint's tokenizer
_AFTERWARDS = 128 * 2**20
# copies of a batch's outputs of all its experts
_OUTPUTS = 4


@dataclass(frozen=True)
class Footprint:
    """Bytes that parts of a model take, of decoder layers those of the largest.

    >>> Footprint.of(view).layer
    5505024

    Attributes:
        base: what the process has now.
        ends: the embedding and the head, to compute with.
        logits: of a batch, and what makes a gradient of them.
        layer: a layer's units, as they are read.
        weights: number of weights in them.
        batch: what goes through a layer together.
        linear: statistics of the inputs of units that are no experts.
        expert: statistics of one expert's inputs.
        unit: number of weights of the largest.
        spaces: of units that share an input: their weights, the input's features, and how many are alike in a layer.
        features: of the largest input.
        experts: how many a layer has.
        hidden: features of a token between two layers.
    """

    base: int
    ends: int
    logits: int
    layer: int
    weights: int
    batch: int
    linear: int
    expert: int
    unit: int
    spaces: frozenset[tuple[int, int, int]]
    features: int
    experts: int
    hidden: int

    @classmethod
    def of(cls, view: ModelView) -> "Footprint":
        """Of a model, in a process that takes no more than it uses (`moqa.memory.process.settle`)."""
        layer = weights = linear = expert = largest = features = experts = 0
        alike: set[tuple[int, int, int]] = set()
        for index in range(len(view.blocks)):
            units = view.block_units(index)
            layer = max(layer, sum(unit.weights * view.itemsize(unit) for unit in units))
            weights = max(weights, sum(unit.weights for unit in units))
            spaces = list(by_input(units).values())
            routed = [sharing for sharing in spaces if sharing[0].expert is not None]
            dense = [sharing for sharing in spaces if sharing[0].expert is None]
            count = len({unit.expert for unit in units if unit.expert is not None})
            linear = max(linear, _squares(dense))
            expert = max(expert, _squares(routed) // max(count, 1))
            largest = max(largest, *(unit.weights for unit in units))
            shapes = Counter(tuple(unit.shape for unit in sharing) for sharing in spaces)
            alike |= {(sum(map(prod, shape)), shape[0][1], count) for shape, count in shapes.items()}
            features = max(features, *(unit.shape[1] for unit in units))
            experts = max(experts, count)
        outputs = _OUTPUTS * max(view.top_k, 1) + 8
        return cls(
            base=resident(), ends=view.ends_bytes(), logits=4 * 4 * view.task.batch_size * view.classes, layer=layer,
            weights=weights, batch=view.task.batch_size * view.stream * 4 * outputs, linear=linear, expert=expert,
            unit=largest, spaces=frozenset(alike), features=features, experts=experts,
            hidden=view.stream,
        )  # fmt: skip

    @property
    def reading_ends(self) -> int:
        """While the ends are read."""
        # half as much again: the ends as they are stored, beside the ends as they compute
        return self.base + self.ends * 3 // 2

    def summing(self, tokens: int) -> int:
        """While an expert's inputs are gathered and multiplied: samples, inputs, outputs, and both counted."""
        return 4 * self.hidden * (min(tokens, TOGETHER) + 4 * min(tokens, ROWS))

    def comparing(self, packed: int, tokens: int) -> int:
        """While a checkpoint's predictions are compared with its original's: it is mapped, tokens wait in front of a
        layer of both, one layer is unpacked or a batch's predictions are there, six times."""
        waiting = 2 * 4 * self.hidden * tokens
        at_work = max(4 * self.weights + self.batch, self.logits * 3 // 2)
        return self.base + _AFTERWARDS + self.ends + packed + waiting + at_work

    def solving(self, copies: int = 1) -> int:
        """While a method works on one stack of matrices, each so many times."""
        found = []
        for weights, features, count in self.spaces:
            entries = min(count, max(1, STACK_WEIGHTS // (copies * weights)))
            stack = 4 * _COPIES * entries * copies * weights
            found.append(stack + (4 * entries + 8 * _SQUARES) * features**2)
        return max(found)


def _squares(spaces: Sequence[Sequence[Unit]]) -> int:
    """Bytes of one statistic of each space's inputs."""
    return sum(4 * sharing[0].shape[1] ** 2 for sharing in spaces)


def as_many(memory: MemoryLimit, fixed: int, each: int, count: int, least: int) -> int:
    """How many of something fit beside what is fixed.

    Raises:
        LittleMemoryError: if not one does.
    """
    smallest = int(max(fixed + each, least) * SLACK)
    if memory.limit < smallest:
        typed = f"--max-memory {memory.typed}" if memory.typed else f"{memory.limit / 2**30:.2f} GiB of free memory"
        raise LittleMemoryError(f"{typed} holds no decoder layer of this model", smallest)
    return max(1, min(count, int(memory.limit / SLACK - fixed) // max(each, 1)))
