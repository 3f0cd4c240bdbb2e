"""Hidden states with which a trial runs single blocks."""

from collections.abc import Collection

import torch
from torch import Tensor

from moqa.models.layerwise import LayerwiseModel


@torch.no_grad()
def states_in_front(stages: LayerwiseModel, inputs: Tensor, blocks: Collection[int]) -> dict[int, Tensor]:
    """Hidden states of a batch at the input of some blocks; the index after the last block means the head.

    >>> states_in_front(stages, tokens, [0, 3])[3].shape
    torch.Size([2, 16, 256])

    In models with a prediction for each position, all blocks have inputs of the same shape: those of the first block
    are used for all, and no block is run.

    Args:
        stages: of the model.
        inputs: a batch.
        blocks: indices of blocks.
    """
    hidden = stages.embed(inputs)
    if stages.task.predicts_each:
        return dict.fromkeys(blocks, hidden)
    states = {}
    for block in range(max(blocks) + 1):
        states[block] = hidden
        if block < max(blocks):
            hidden = stages.run_block(block, hidden).float()
    return states
