"""Attributes that a module has for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def having(owner: Any, name: str, value: object) -> Iterator[None]:
    """A `with` block in which an object has an attribute that it does not have otherwise.

    >>> with having(view.model, "forward", lambda: "nothing"):
    ...     view.model()
    'nothing'
    """
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
