"""Import one module as soon as another is imported, without importing the latter now."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def on_import(name: str, follower: str) -> None:
    """Import the module `follower` as soon as the module `name` is imported; now, if it already is.

    >>> on_import("transformers.quantizers.auto", "moqa.integrations.transformers")
    """
    if name in sys.modules:
        importlib.import_module(follower)
    else:
        sys.meta_path.insert(0, _Watcher(name, follower))


class _Watcher(MetaPathFinder):
    def __init__(self, name: str, follower: str) -> None:
        self._name, self._follower = name, follower

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
            _import_after(spec.loader, self._follower)
        return spec


def _import_after(loader: Loader, follower: str) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        importlib.import_module(follower)

    loader.exec_module = exec_module  # type: ignore[method-assign]
