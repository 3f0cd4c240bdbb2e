"""Working sets: how much of a model fits into the memory at a time, and the peak that follows."""

from dataclasses import dataclass

from moqa.calibration.inputs import HELD_OUT_EVERY
from moqa.errors import LittleMemoryError
from moqa.forecast.footprint import COMPUTING, SLACK, Footprint, as_many
from moqa.memory.limit import MemoryLimit
from moqa.methods import Method
from moqa.models.view import ModelView


@dataclass(frozen=True)
class WorkingSet:
    """How much of a block is worked on at a time.

    >>> from moqa.methods import METHODS
    >>> WorkingSet.to_profile(MemoryLimit.parse("64GiB"), view, METHODS["gptq"], probes=4).experts
    16

    Attributes:
        experts: number of experts whose errors (of a profile) or statistics (of a quantization) are held together.
        peak: largest resident memory in bytes.
        ahead: whether the next block is read, and the previous one written, in the background.
    """

    experts: int
    peak: int
    ahead: bool = False

    @classmethod
    def to_profile(cls, memory: MemoryLimit, view: ModelView, method: Method, probes: int) -> "WorkingSet":
        """The largest working set of `moqa.profile` that fits into the memory.

        Args:
            memory: the limit.
            view: the model.
            method: method whose errors are measured.
            probes: number of widths whose errors are made.

        Raises:
            MoqaError: if not even one expert fits; names the memory that is needed.
        """
        sizes = Footprint(view)
        # errors are held in half precision; those of other units together with those of the first experts
        errors = 2 * probes * (sizes.weights // max(sizes.experts, 1))
        each = errors + (sizes.expert if method.needs_data else 0)
        # in a backward pass there are a batch's outputs and their gradients
        fixed = sizes.base + COMPUTING + sizes.layer + sizes.linear + sizes.solving(probes) + 2 * sizes.batch
        least = max(sizes.reading_ends, sizes.base + sizes.ends + sizes.logits)
        experts = as_many(memory, fixed, each, sizes.experts, least)
        return cls(experts, max(least, fixed + each * experts))

    @classmethod
    def to_quantize(
        cls, memory: MemoryLimit, view: ModelView, method: Method, tokens: int, packed: int
    ) -> "WorkingSet":
        """The largest working set of `moqa.quantize` that fits into the memory.

        >>> from moqa.methods import METHODS
        >>> WorkingSet.to_quantize(MemoryLimit.parse("64GiB"), view, METHODS["gptq"], 16384, 2_000_000).experts
        16

        Args:
            memory: the limit.
            view: the model.
            method: quantization method.
            tokens: of all samples.
            packed: bytes of the largest block as it will be stored.

        Raises:
            MoqaError: if not even one expert fits; names the memory that is needed.
        """
        sizes = Footprint(view)
        if not method.needs_data:
            return cls._without_data(memory, sizes, packed)
        solving = packed + sizes.solving(by_outputs=True)
        fixed = sizes.base + COMPUTING + sizes.layer + max(solving, sizes.summing(tokens))
        # held-out inputs of an expert: up to twice the average number, at most as large as their Gram matrix
        rows = 2 * tokens / HELD_OUT_EVERY * view.top_k / max(sizes.experts, 1)
        each = round(sizes.expert * (1 + min(1.0, rows / sizes.features))) + sizes.slopes
        fixed += 2 * sizes.linear
        running = sizes.base + COMPUTING + packed + sizes.batch
        least = max(sizes.reading_ends, sizes.base + COMPUTING + sizes.layer + sizes.batch, running)
        experts = as_many(memory, fixed, each, sizes.experts, least)
        return cls(experts, max(least, fixed + each * experts))

    @classmethod
    def _without_data(cls, memory: MemoryLimit, sizes: Footprint, packed: int) -> "WorkingSet":
        """For a method that needs no data: blocks do not depend on each other."""
        # a unit as it is read, its integers, and what they are packed from
        fixed, ends = sizes.base + sizes.layer + packed + 4 * sizes.unit, sizes.reading_ends
        experts = as_many(memory, fixed, 0, sizes.experts, ends)
        more = max(fixed + sizes.layer + packed, ends + sizes.layer)
        if memory.limit < more * SLACK:
            return cls(experts, max(fixed, ends))
        return cls(experts, more, ahead=True)

    @classmethod
    def to_compare(cls, memory: MemoryLimit, view: ModelView, packed: int, tokens: int) -> "WorkingSet":
        """What the comparison of a checkpoint with its original needs; experts are not worked on one by one.

        >>> WorkingSet.to_compare(MemoryLimit.parse("64GiB"), view, 12_922_880, 16384).peak > 12_922_880
        True

        Args:
            memory: the limit.
            view: the original.
            packed: bytes of the checkpoint.
            tokens: of the text on which they are compared.

        Raises:
            LittleMemoryError: if a limit that the user typed is smaller.
        """
        sizes = Footprint(view)
        without = sizes.comparing(packed, tokens)
        peak = without + view.missing(memory)
        # without a typed limit, mapped files do not matter: the system drops their pages when it needs the memory
        if memory.typed and memory.limit < peak * SLACK:
            # with a slightly larger limit the whole original may be read, which needs more memory
            peak = max(peak, without + view.missing(MemoryLimit(int(without * SLACK))))
            raise LittleMemoryError(
                f"--max-memory {memory.typed} does not hold a checkpoint and its original to compare them",
                int(peak * SLACK), ", or give --no-proof",
            )  # fmt: skip
        return cls(sizes.experts, peak)
