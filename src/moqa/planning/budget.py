"""Budgets as users type them: `--bpw 2.5`, `--size 12MiB`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from moqa.errors import MoqaError
from moqa.memory.limit import parse_size


def parse_share(text: str | float) -> float:
    """A share of a checkpoint's bytes.

    >>> parse_share("1%"), parse_share(0.03)
    (0.01, 0.03)

    Raises:
        MoqaError: if it is not a number between 0 and 1.
    """
    typed = str(text).strip()
    try:
        share = float(typed.removesuffix("%")) / (100 if typed.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise MoqaError(f"--bytes {text} is not a share of the checkpoint's bytes", "give e.g. 1%")
    return share


@dataclass(frozen=True)
class Budget:
    """A limit in bytes, on the units alone or on all weight files.

    >>> Budget.parse(bpw=2.5)
    Budget(typed='--bpw 2.5', bits_per_weight=2.5, bytes=None)
    >>> Budget.parse(size="12MiB").bytes
    12582912
    """

    typed: str
    bits_per_weight: float | None = None
    bytes: int | None = None

    # whether a limit far above the largest plan is refused as a typing error
    fills: ClassVar[bool] = True

    @classmethod
    def parse(cls, bpw: float | None = None, size: str | int | None = None) -> "Budget | None":
        """Budget from the options of the command line; None if neither is given.

        Args:
            bpw: stored bits per weight of the units.
            size: of all weight files, in bytes or with a unit: KB, MB, GB, KiB, MiB, GiB.

        Raises:
            MoqaError: if both are given, or one cannot be parsed.
        """
        if bpw is not None and size is not None:
            raise MoqaError(f"--bpw {bpw:g} and --size {size} are two budgets", "give one of them")
        if bpw is not None:
            if not 0 < bpw < 64:
                raise MoqaError(f"--bpw {bpw:g} is not a number of bits per weight", "give e.g. --bpw 2.5")
            return cls(f"--bpw {bpw:g}", bits_per_weight=bpw)
        if size is None:
            return None
        return cls(f"--size {size}", bytes=parse_size(size, "--size"))

    @classmethod
    def of(cls, text: str) -> "Budget":
        """Budget from a single word.

        >>> Budget.of("2.5bpw").bits_per_weight, Budget.of("12MiB").bytes
        (2.5, 12582912)
        """
        bits = text.strip().lower().removesuffix("bpw").strip()
        if bits == text.strip().lower():
            budget = cls.parse(size=text)
        else:
            try:
                budget = cls.parse(bpw=float(bits))
            except ValueError:
                raise MoqaError(f"{text} is not a budget", "give e.g. 2.5bpw or 12MiB") from None
        assert budget is not None
        return budget

    @property
    def counts(self) -> Literal["units", "checkpoint"]:
        """Whether the limit is on the units' bytes or on all weight files."""
        return "units" if self.bytes is None else "checkpoint"

    def limit(self, weights: int) -> int:
        """Allowed bytes for a model whose units have `weights` weights in total."""
        if self.bytes is not None:
            return self.bytes
        bits = self.bits_per_weight or 0.0
        # the limit may be typed from a plan's rounded bits per weight: that plan must still fit
        limit = int(bits * weights / 8) + 1
        while limit * 8 / weights > bits:
            limit -= 1
        return limit

    def below(self, smallest: int, reachable: str) -> MoqaError:  # noqa: ARG002
        """Make the error for a limit that no plan can keep.

        Args:
            smallest: bytes of the smallest plan's weight files.
            reachable: sizes of the smallest and largest plan, in words.
        """
        return MoqaError(f"{self.typed} is below the smallest plan of this profile", reachable)
