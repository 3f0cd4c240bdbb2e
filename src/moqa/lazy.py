"""Lazy packages: names are imported when they are first used, so importing the package itself loads nothing heavy."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazily(package: str, homes: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make `__getattr__` and `__dir__` for a package; type checkers need separate imports of the same names.

    >>> __getattr__, __dir__ = lazily("moqa.planning", {"moqa.planning.budget": ("Budget",)})
    >>> __getattr__("Budget").__module__
    'moqa.planning.budget'

    Args:
        package: name of the package.
        homes: module -> names that it defines.
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
