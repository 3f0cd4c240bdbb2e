"""What every trial needs: a stopwatch for repeated work, and hidden states to run single blocks with."""

import time
from collections.abc import Callable, Collection
from statistics import fmean

import torch
from torch import Tensor

from moqa.models.layerwise import LayerwiseModel

# The first time, caches are cold and products are not compiled yet, which costs tenths of a second at most. Work of at
# least _LONG seconds is therefore done only once; shorter work is repeated for _REPEAT seconds or _MOST_REPEATS times.
_LONG, _REPEAT, _MOST_REPEATS = 1.0, 0.2, 4


class Stopwatch:
    """Times pieces of work.

    >>> watch = Stopwatch()
    >>> watch.seconds(lambda: stages.run_block(0, hidden)) > 0
    True

    Args:
        clock: returns elapsed seconds.
        work: returns processor seconds of all cores.

    Attributes:
        once: total of the additional seconds of first times.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, work: Callable[[], float] = time.process_time
    ) -> None:
        self.clock, self._work, self.once = clock, work, 0.0

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds of repeatable work, without the additional time of the first time."""
        first, _ = self.single(work)
        if first >= _LONG:
            return first
        # the mean, not the minimum: long work does not run at the best speed
        took = [self.single(work)[0]]
        while len(took) < _MOST_REPEATS and sum(took) < _REPEAT:
            took.append(self.single(work)[0])
        again = fmean(took)
        self.once += max(first - again, 0.0)
        return again

    def single(self, work: Callable[[], object]) -> tuple[float, float]:
        """Elapsed seconds and processor seconds of work that is done once."""
        began, busy = self.clock(), self._work()
        work()
        return self.clock() - began, self._work() - busy


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
