"""What a run of `moqa.profile` does at a time."""

from dataclasses import dataclass

from moqa.methods import Method
from moqa.methods.room import COMPUTING, Sizes, as_many
from moqa.models.memory import Memory
from moqa.models.view import ModelView
from moqa.profile.sensitivity import PROBES


@dataclass(frozen=True)
class Room:
    """How much of a decoder layer is measured at a time.

    >>> Room.within(Memory.parse("4GiB"), view, METHODS["gptq"]).experts
    12

    Attributes:
        experts: whose errors are held together.
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
        sizes, probes = Sizes.of(view), len(PROBES)
        # errors are held in half precision, those of units that are no experts with the first experts'
        errors = 2 * probes * (sizes.weights // max(sizes.experts, 1))
        each = errors + (sizes.expert if method.needs_data else 0)
        # backwards, a batch's outputs and their gradients are there
        fixed = sizes.base + COMPUTING + sizes.layer + sizes.linear + sizes.solving(probes) + 2 * sizes.batch
        least = max(sizes.reading_ends, sizes.base + sizes.ends + sizes.logits)
        experts = as_many(memory, fixed, each, sizes.experts, least)
        return cls(experts, max(least, fixed + each * experts))
