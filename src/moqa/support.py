"""The systems that moqa supports (docs/platforms.md); all others are refused."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

from moqa.errors import MoqaError

_NAMES = {"darwin": "macOS", "win32": "Windows", "cygwin": "Cygwin"}
# modules that can be imported on any system: what the command needs to print the error
_EVERYWHERE = frozenset({
    "moqa.__main__", "moqa.cli", "moqa.cli.main", "moqa.errors", "moqa.integrations", "moqa.integrations.on_import",
    "moqa.support",
})  # fmt: skip


def unsupported() -> str | None:
    """The unsupported property of this system; None if moqa supports it.

    >>> unsupported()
    """
    if sys.platform != "linux":
        return _NAMES.get(sys.platform, sys.platform)
    return None if sys.byteorder == "little" else "a big-endian processor"


def check_system() -> None:
    """Refuse an unsupported system before a call fails on something that only Linux has.

    >>> check_system()

    Raises:
        MoqaError: if the system is not listed in docs/platforms.md.
    """
    if found := unsupported():
        raise MoqaError(
            f"moqa does not run on {found}", "it needs Linux on a little-endian processor, e.g. a container"
        )


class Refusal(MetaPathFinder):
    """Import hook for unsupported systems: refuses every module of moqa except those that print the error.

    >>> sys.meta_path.insert(0, Refusal())
    """

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> None:
        """See `MetaPathFinder`."""
        if fullname.startswith("moqa.") and fullname not in _EVERYWHERE:
            check_system()
