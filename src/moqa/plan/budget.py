"""Budgets as users type them: `--bpw 2.5`, `--size 12MiB`."""

import re
from dataclasses import dataclass
from typing import Literal

from moqa.errors import MoqaError

_FACTORS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
    "TIB": 2**40,
}  # fmt: skip


def parse_share(text: str | float) -> float:
    """A share of a checkpoint's bytes.

    >>> parse_share("1%"), parse_share(0.03)
    (0.01, 0.03)

    Raises:
        MoqaError: if it is none, or not between 0 and 1.
    """
    typed = str(text).strip()
    try:
        share = float(typed.removesuffix("%")) / (100 if typed.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise MoqaError(f"--bytes {text} is no share of the checkpoint's bytes", "give e.g. 1%")
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

    @classmethod
    def parse(cls, bpw: float | None = None, size: str | int | None = None) -> "Budget | None":
        """Budget from the command line's options; None if neither is given.

        Args:
            bpw: stored bits per weight of the units.
            size: of all weight files, in bytes or with a unit: KB, MB, GB, KiB, MiB, GiB.

        Raises:
            MoqaError: if both are given or one cannot be read.
        """
        if bpw is not None and size is not None:
            raise MoqaError(f"--bpw {bpw:g} and --size {size} are two budgets", "give one of them")
        if bpw is not None:
            if not 0 < bpw < 64:
                raise MoqaError(f"--bpw {bpw:g} is no number of bits", "give e.g. --bpw 2.5")
            return cls(f"--bpw {bpw:g}", bits_per_weight=bpw)
        if size is None:
            return None
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
        if match is None or match[2].upper() not in _FACTORS:
            raise MoqaError(f"--size {size} is no size", "give bytes or e.g. 12MiB, 3.5GB")
        return cls(f"--size {size}", bytes=int(float(match[1]) * _FACTORS[match[2].upper()]))

    @classmethod
    def of(cls, text: str) -> "Budget":
        """Budget in one word.

        >>> Budget.of("2.5bpw").bits_per_weight, Budget.of("12MiB").bytes
        (2.5, 12582912)
        """
        bits = text.strip().lower().removesuffix("bpw").strip()
        if bits == text.strip().lower():
            found = cls.parse(size=text)
        else:
            try:
                found = cls.parse(bpw=float(bits))
            except ValueError:
                raise MoqaError(f"{text} is no budget", "give e.g. 2.5bpw or 12MiB") from None
        assert found is not None
        return found

    @property
    def counts(self) -> Literal["units", "checkpoint"]:
        """Whether the limit is on the units' bytes or on all weight files."""
        return "units" if self.bytes is None else "checkpoint"

    def limit(self, weights: int) -> int:
        """Bytes allowed, for a model whose units have that many weights."""
        if self.bytes is not None:
            return self.bytes
        bits = self.bits_per_weight or 0.0
        # the bits of a plan may be a rounded number: the plan itself must still fit
        limit = int(bits * weights / 8) + 1
        while limit * 8 / weights > bits:
            limit -= 1
        return limit
