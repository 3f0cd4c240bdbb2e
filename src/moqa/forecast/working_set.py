"""How much of a model is worked on at a time, so that a process stays within its memory, and what it takes then."""

from dataclasses import dataclass

from moqa.calibration.inputs import HELD_OUT_EVERY
from moqa.errors import LittleMemoryError
from moqa.forecast.footprint import COMPUTING, SLACK, Footprint, as_many
from moqa.memory.limit import MemoryLimit
from moqa.methods import Method
from moqa.models.view import ModelView


@dataclass(frozen=True)
class ProfileWorkingSet:
    """How much of a decoder layer is measured at a time.

    >>> ProfileWorkingSet.within(MemoryLimit.parse("4GiB"), view, METHODS["gptq"], probes=4).experts
    12

    Attributes:
        experts: whose errors are held together.
        peak: bytes that will be resident at most.
    """

    experts: int
    peak: int

    @classmethod
    def within(cls, memory: MemoryLimit, view: ModelView, method: Method, probes: int) -> "ProfileWorkingSet":
        """As much at a time as the memory holds.

        Args:
            memory: the limit.
            view: the model.
            method: whose errors are measured.
            probes: widths whose errors are made.

        Raises:
            MoqaError: if it does not hold one expert at a time; says what would do.
        """
        sizes = Footprint.of(view)
        # errors are held in half precision, those of units that are no experts with the first experts'
        errors = 2 * probes * (sizes.weights // max(sizes.experts, 1))
        each = errors + (sizes.expert if method.needs_data else 0)
        # backwards, a batch's outputs and their gradients are there
        fixed = sizes.base + COMPUTING + sizes.layer + sizes.linear + sizes.solving(probes) + 2 * sizes.batch
        least = max(sizes.reading_ends, sizes.base + sizes.ends + sizes.logits)
        experts = as_many(memory, fixed, each, sizes.experts, least)
        return cls(experts, max(least, fixed + each * experts))


@dataclass(frozen=True)
class QuantizationWorkingSet:
    """How much of a decoder layer is worked on at a time.

    >>> QuantizationWorkingSet.within(MemoryLimit.parse("4GiB"), view, METHODS["gptq"], 16384, 200_000_000).experts
    34

    Attributes:
        experts: whose statistics are held together.
        peak: bytes that will be resident at most.
        ahead: whether the next layer is read, and the last one written, while one is worked on.
    """

    experts: int
    peak: int
    ahead: bool = False

    @classmethod
    def within(
        cls, memory: MemoryLimit, view: ModelView, method: Method, tokens: int, packed: int
    ) -> "QuantizationWorkingSet":
        """As much at a time as the memory holds.

        Args:
            memory: the limit.
            view: the model.
            method: how it is quantized.
            tokens: of samples.
            packed: bytes of the largest layer as it will be stored.

        Raises:
            MoqaError: if it does not hold one expert at a time; says what would do.
        """
        sizes = Footprint.of(view)
        if not method.needs_data:
            return cls._by_itself(memory, sizes, packed)
        fixed = sizes.base + COMPUTING + sizes.layer + max(packed + sizes.solving(), sizes.summing(tokens))
        # by some of an expert's samples results are compared: twice as many as on average, no more than their squares
        rows = 2 * tokens / HELD_OUT_EVERY * view.top_k / max(sizes.experts, 1)
        each = round(sizes.expert * (1 + min(1.0, rows / sizes.features)))
        fixed += 2 * sizes.linear
        running = sizes.base + COMPUTING + packed + sizes.batch
        least = max(sizes.reading_ends, sizes.base + COMPUTING + sizes.layer + sizes.batch, running)
        experts = as_many(memory, fixed, each, sizes.experts, least)
        return cls(experts, max(least, fixed + each * experts))

    @classmethod
    def _by_itself(cls, memory: MemoryLimit, sizes: Footprint, packed: int) -> "QuantizationWorkingSet":
        """For a method that needs no data: layers do not wait for each other."""
        # a unit as it is read, its integers, and what they are packed from
        fixed, ends = sizes.base + sizes.layer + packed + 4 * sizes.unit, sizes.reading_ends
        experts = as_many(memory, fixed, 0, sizes.experts, ends)
        more = max(fixed + sizes.layer + packed, ends + sizes.layer)
        if memory.limit < more * SLACK:
            return cls(experts, max(fixed, ends))
        return cls(experts, more, ahead=True)


def comparison_peak(memory: MemoryLimit, view: ModelView, packed: int, tokens: int) -> int:
    """Bytes that will be resident at most while a checkpoint is compared with its original.

    >>> comparison_peak(MemoryLimit.parse("4GiB"), view, 12_922_880, 16384)
    618070016

    Args:
        memory: the limit.
        view: the original.
        packed: bytes of the checkpoint.
        tokens: of the text on which they are compared.

    Raises:
        LittleMemoryError: if a limit that was typed is smaller.
    """
    without = Footprint.of(view).comparing(packed, tokens)
    peak = without + view.missing(memory)
    # mapped files are left to the system otherwise: it forgets them when it needs the memory
    if memory.typed and memory.limit < peak * SLACK:
        # a little more may hold the original as a whole, and then it will
        peak = max(peak, without + view.missing(MemoryLimit(int(without * SLACK))))
        raise LittleMemoryError(
            f"--max-memory {memory.typed} does not hold a checkpoint beside its original to compare them",
            int(peak * SLACK), ", or give --no-proof",
        )  # fmt: skip
    return peak
