"""Lazy packages: names are imported when they are first used, so importing the package itself loads nothing heavy."""

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazily(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make `__getattr__` and `__dir__` for a package whose names are imported under `if TYPE_CHECKING:` in its file.

    >>> __getattr__, __dir__ = lazily("moqa.planning", moqa.planning.__file__)
    >>> __getattr__("Budget").__module__
    'moqa.planning.budget'

    Type checkers and readers see ordinary imports; these are executed one by one, when a name is first used.

    Args:
        package: name of the package.
        file: its `__init__.py`.
    """
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    blocks = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [line for block in blocks for line in block.body if isinstance(line, ast.ImportFrom)]
    home = {alias.name: str(line.module) for line in imports for alias in line.names}

    def find(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(home[name]), name)
        setattr(sys.modules[package], name, found)
        return found

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home})

    return find, names
