"""What a trial sends through single blocks."""

from collections.abc import Collection

import torch
from torch import Tensor

from moqa.models.layerwise import LayerwiseModel


@torch.no_grad()
def states_in_front(stages: LayerwiseModel, inputs: Tensor, blocks: Collection[int]) -> dict[int, Tensor]:
    """Hidden states of a batch at the input of some blocks; of the one behind the last, at the head's.

    >>> states_in_front(stages, tokens, [0, 3])[3].shape
    torch.Size([4, 256, 256])

    Hidden states that have a prediction for each position keep their shape: there the first block's stand for all, and
    no block is run.

    Args:
        stages: of the model.
        inputs: a batch.
        blocks: indices.
    """
    hidden = stages.embed(inputs)
    if stages.task.predicts_each:
        return dict.fromkeys(blocks, hidden)
    found = {}
    for block in range(max(blocks) + 1):
        found[block] = hidden
        if block < max(blocks):
            hidden = stages.run_block(block, hidden).float()
    return found
