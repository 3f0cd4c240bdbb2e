"""What a run of `moqa.quantize` does at a time."""

from dataclasses import dataclass

from moqa.methods import Method
from moqa.methods.room import Sizes, as_many
from moqa.models.memory import Memory
from moqa.models.view import ModelView


@dataclass(frozen=True)
class Room:
    """How much of a decoder layer is worked on at a time.

    >>> Room.within(Memory.parse("4GiB"), view, METHODS["gptq"]).experts
    34

    Attributes:
        experts: whose statistics are held together.
        peak: bytes that will be resident at most.
    """

    experts: int
    peak: int

    @classmethod
    def within(cls, memory: Memory, view: ModelView, method: Method) -> "Room":
        """As much at a time as the memory holds.

        Raises:
            MoqaError: if it does not hold one expert at a time; says what would do.
        """
        sizes = Sizes.of(view)
        fixed = sizes.base + sizes.layer + sizes.weights + sizes.solving()
        each = 2 * sizes.expert if method.needs_data else 0
        if not method.needs_data:
            experts = as_many(memory, fixed, 0, sizes.experts, sizes.reading_ends)
            return cls(experts, peak=max(sizes.reading_ends, fixed))
        fixed += 2 * sizes.linear
        running = sizes.base + sizes.weights + sizes.batch
        least = max(sizes.reading_ends, sizes.base + sizes.layer + sizes.batch, running)
        experts = as_many(memory, fixed, each, sizes.experts, least)
        return cls(experts, max(least, fixed + each * experts))
