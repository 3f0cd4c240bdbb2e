"""Variants that take turns at one model between the steps of what it yields."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_T = TypeVar("_T")


def steps_with(
    use: "Callable[[str], PreTrainedModel]", name: str, make: "Callable[[PreTrainedModel], Iterator[_T]]"
) -> Iterator[_T]:  # fmt: skip
    """What a model yields step by step, with a variant in use in each; others may be used between them.

    >>> list(steps_with(lambda name: name, "a", lambda model: iter(model * 2)))
    ['a', 'a']

    Args:
        use: puts a variant into use and returns its model.
        name: of the variant.
        make: begins with that model.
    """
    made = make(use(name))
    while True:
        use(name)
        try:
            piece = next(made)
        except StopIteration:
            return
        yield piece
