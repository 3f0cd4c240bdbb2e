"""Packages whose names are imported when they are first used, so that importing the package loads nothing heavy."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazily(package: str, homes: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package; type checkers get its names by imports of their own.

    >>> if not TYPE_CHECKING:
    ...     __getattr__, __dir__ = lazily(__name__, {"moqa.planning.budget": ("Budget",)})

    Args:
        package: its name.
        homes: module -> names that are defined there.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def find(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(home[name]), name)
        setattr(sys.modules[package], name, found)
        return found

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home})

    return find, names
