"""How much memory the process may use."""

import re
from dataclasses import dataclass

from moqa.errors import MoqaError
from moqa.memory.free import free_on_machine
from moqa.memory.process import resident

_FACTORS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
    "TIB": 2**40,
}  # fmt: skip


@dataclass(frozen=True)
class MemoryLimit:
    """A limit for the resident memory of the process.

    >>> MemoryLimit.parse("4GiB").limit
    4294967296

    Attributes:
        limit: bytes that may be resident.
        typed: as the user typed it; None if it is the free memory.
    """

    limit: int
    typed: str | None = None

    @classmethod
    def parse(cls, text: str) -> "MemoryLimit":
        """A limit as users type it.

        Raises:
            MoqaError: if it is not a size.
        """
        return cls(parse_size(text, "--max-memory"), text)

    @classmethod
    def free(cls) -> "MemoryLimit":
        """Free memory of this machine or container, plus what the process already uses."""
        return cls(free_on_machine() + resident())

    def holds(self, values: int) -> bool:
        """Whether a number of values fits in float32, with half as much again for the work on them."""
        return resident() + values * 6 <= self.limit


def parse_size(text: str | int, option: str) -> int:
    """Bytes of a size as users type it.

    >>> parse_size("12MiB", "--size")
    12582912

    Args:
        text: bytes, or a number with a unit: KB, MB, GB, TB, KiB, MiB, GiB, TiB.
        option: option that it was typed after, for the message.

    Raises:
        MoqaError: if it is not a size.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in _FACTORS:
        raise MoqaError(f"{option} {text} is not a size", "give bytes or e.g. 12MiB, 3.5GB")
    return int(float(match[1]) * _FACTORS[match[2].upper()])
