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
    """Run a block again with gradients, batch by batch; whoever watches its units sees them.

    >>> run_back(stages, 3, [(hidden, gradient)], lambda number, gradient: gradients.append(gradient))

    Args:
        stages: of the model.
        block: index.
        batches: inputs of the block, and the gradients of its outputs.
        keep: called with the number of each batch and the gradient of its inputs.
        precision: what the block computes in, made anew for every batch.
    """
    for number, (hidden, gradient) in enumerate(batches):
        inputs = hidden.detach().requires_grad_(True)
        with precision():
            out = stages.run_block(block, inputs)
        keep(number, torch.autograd.grad(out, inputs, gradient)[0])
