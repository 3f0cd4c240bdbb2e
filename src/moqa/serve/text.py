"""One text that a request asks for, and the adjustment that it is written with."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from moqa.generation import Piece, Sampling


@dataclass(eq=False)
class Chosen:
    """The adjustment of one request, from its first token to its last; an adjustment is held while one refers to it.

    Attributes:
        name: of the adjustment; None is the checkpoint as it is.
        explicit: whether the request said so itself.
        keeps: what must live as long.
    """

    name: str | None = None
    explicit: bool = False
    keeps: object = None


@dataclass(eq=False)
class ServedText:
    """One text to be written.

    Attributes:
        ids: tokens of the prompt.
        sampling: how to continue it.
        deliver: called in the scheduler's thread with each piece that says something; an exception is the last.
        chosen: the adjustment to write it with.
    """

    ids: Sequence[int]
    sampling: Sampling
    deliver: Callable[[Piece | Exception], None]
    chosen: Chosen = field(default_factory=Chosen)
    cancelled: bool = False
    pieces: Iterator[Piece] | None = None
    last: float = field(default_factory=time.monotonic)  # when it came, then when its last token did
    written: int = 0
