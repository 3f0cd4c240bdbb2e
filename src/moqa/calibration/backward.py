"""The backward pass, one block at a time."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from moqa.models.layerwise import LayerwiseModel


def run_back(
    stages: LayerwiseModel,
    block: int,
    batches: Iterable[tuple[Tensor, Tensor]],
    keep: Callable[[int, Tensor], None],
    *,
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Run a block again with gradients, batch by batch; observers of its units see the gradients.

    >>> gradients = []
    >>> run_back(stages, 3, [(hidden, torch.ones_like(hidden))], lambda number, found: gradients.append(found))
    >>> gradients[0].shape
    torch.Size([2, 16, 256])

    Args:
        stages: of the model.
        block: index of the block.
        batches: inputs of the block, and the gradients of its outputs.
        keep: called with the number of each batch and the gradient of its inputs.
        precision: makes the context in which the block runs, for every batch anew.
    """
    for number, (hidden, gradient) in enumerate(batches):
        inputs = hidden.detach().requires_grad_(True)
        with precision():
            out = stages.run_block(block, inputs)
        keep(number, torch.autograd.grad(out, inputs, gradient)[0])
