"""Folders that are functions too: `moqa.plan(...)` and `from moqa.plan import Plan` both work."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def callable_folder(name: str, function: Callable[..., Any]) -> None:
    """Make a package callable as the function of the same name.

    >>> callable_folder(__name__, plan)

    Python binds a package to its name whenever it is first imported, over any function of that name; so the package
    itself has to be what can be called.
    """

    class CallableFolder(ModuleType):
        __doc__ = function.__doc__

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    sys.modules[name].__class__ = CallableFolder
