"""Run something once another package is imported, without importing it."""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def on_import(name: str, action: Callable[[], object]) -> None:
    """Call `action` after the module `name` is imported; at once if it is already.

    >>> on_import("transformers.quantizers.auto", lambda: print("transformers is here"))
    """
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Watcher(name, action))


class _Watcher(MetaPathFinder):
    def __init__(self, name: str, action: Callable[[], object]) -> None:
        self._name, self._action = name, action

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            _act_after(spec.loader, self._action)
        return spec


def _act_after(loader: Loader, action: Callable[[], object]) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        action()

    loader.exec_module = exec_module  # type: ignore[method-assign]


def importer(name: str) -> Callable[[], object]:
    """A function that imports a module."""
    return lambda: importlib.import_module(name)
