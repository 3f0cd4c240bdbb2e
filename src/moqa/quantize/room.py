"""What a run of `moqa.quantize` does at a time."""

from dataclasses import dataclass

from moqa.methods import Method
from moqa.methods.room import Sizes, as_many
from moqa.models.memory import Memory
from moqa.models.view import ModelView
from moqa.quantize.flow import CHECK_EVERY


@dataclass(frozen=True)
class Room:
    """How much of a decoder layer is worked on at a time.

    >>> Room.within(Memory.parse("4GiB"), view, METHODS["gptq"], 16384).experts
    34

    Attributes:
        experts: whose statistics are held together.
        peak: bytes that will be resident at most.
    """

    experts: int
    peak: int

    @classmethod
    def within(cls, memory: Memory, view: ModelView, method: Method, tokens: int) -> "Room":
        """As much at a time as the memory holds, for so many tokens of samples.

        Raises:
            MoqaError: if it does not hold one expert at a time; says what would do.
        """
        sizes = Sizes.of(view)
        fixed = sizes.base + sizes.layer + sizes.weights + sizes.solving()
        if not method.needs_data:
            experts = as_many(memory, fixed, 0, sizes.experts, sizes.reading_ends)
            return cls(experts, peak=max(sizes.reading_ends, fixed))
        # by some of an expert's samples results are compared: twice as many as on average, no more than their squares
        rows = 2 * tokens / CHECK_EVERY * view.top_k / max(sizes.experts, 1)
        each = round(sizes.expert * (1 + min(1.0, rows / sizes.features)))
        fixed += 2 * sizes.linear
        running = sizes.base + sizes.weights + sizes.batch
        least = max(sizes.reading_ends, sizes.base + sizes.layer + sizes.batch, running)
        experts = as_many(memory, fixed, each, sizes.experts, least)
        return cls(experts, max(least, fixed + each * experts))
