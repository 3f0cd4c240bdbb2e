"""The memory that a training takes, and whether the whole model or one block after the other is trained."""

from moqa.errors import LittleMemoryError
from moqa.forecast.footprint import COMPUTING, SLACK, Footprint
from moqa.memory.limit import MemoryLimit
from moqa.models.view import ModelView

# bytes for each weight that is trained: its value, its gradient, and what is stored
_PER_WEIGHT = 10
# the same where its integer is trained: also where it begins, how far it has moved, and what an optimizer remembers
_PER_INTEGER = 34
# hidden states and outputs of a batch: they are kept for the backward pass, and there are their gradients
_BATCHES = 3


def trains_whole(view: ModelView, memory: MemoryLimit, integers: bool = False) -> bool:
    """Whether the whole model fits the memory while it is trained; if not, one block after the other is trained.

    >>> trains_whole(view, MemoryLimit.parse("4GiB"))
    True

    Args:
        view: the model.
        memory: that there is.
        integers: whether they are trained, too.

    Raises:
        LittleMemoryError: if not even the training of one block fits; names the memory that is needed.
    """
    sizes, each = Footprint(view), _PER_INTEGER if integers else _PER_WEIGHT
    fixed = sizes.base + COMPUTING + sizes.ends + _BATCHES * sizes.batch
    block = int((fixed + max(each * sizes.weights, sizes.layer, sizes.logits)) * SLACK)
    if memory.limit < block:
        raise LittleMemoryError(f"{memory} is too small to train one block of this model", block)
    whole = sum(unit.weights for unit in view.units.values())
    batches = len(view.blocks) * _BATCHES * sizes.batch
    return memory.limit >= (fixed + batches + each * whole + sizes.logits) * SLACK
