"""The systems that moqa runs on (docs/platforms.md), and the refusal of all others."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

from moqa.errors import MoqaError

_NAMES = {"darwin": "macOS", "win32": "Windows", "cygwin": "Cygwin"}
# enough for the command to say what is wrong
_EVERYWHERE = frozenset({
    "moqa.__main__", "moqa.cli", "moqa.cli.app", "moqa.cli.main", "moqa.errors", "moqa.integrations",
    "moqa.integrations.on_import", "moqa.support",
})  # fmt: skip


def unsupported() -> str | None:
    """What of this system moqa does not run on; None on a system that it runs on.

    >>> unsupported()
    """
    if sys.platform != "linux":
        return _NAMES.get(sys.platform, sys.platform)
    return None if sys.byteorder == "little" else "a big-endian processor"


def check_system() -> None:
    """Refuse a system that moqa does not run on, before a call fails on something that only Linux has.

    >>> check_system()

    Raises:
        MoqaError: if it is none of docs/platforms.md.
    """
    if found := unsupported():
        raise MoqaError(
            f"moqa does not run on {found}", "it needs Linux on a little-endian processor, e.g. a container"
        )


class Refusal(MetaPathFinder):
    """Refuses every module of moqa whose functions need more than any system has.

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
