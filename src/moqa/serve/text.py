"""One text of a request, and the adjustment that it is written with."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moqa.generation import Piece, Sampling

if TYPE_CHECKING:
    from moqa.serve.kept import MadeAdjustment


@dataclass(eq=False)
class Chosen:
    """The adjustment of one request, or the variant of one text of a mixture, from its first token to its last.

    Attributes:
        name: of the adjustment, None for the checkpoint without one; or of the variant, None until it is chosen.
        explicit: whether the request chose it.
        made: the adjustment if the server made it; it stays loaded as long as this refers to it.
        client: whose request it is; None if nothing says so.
        confidence: of a mixture's router in its choice; None if it did not choose.
        problem: why another variant is used than the one chosen; None if it is not.
    """

    name: str | None = None
    explicit: bool = False
    made: "MadeAdjustment | None" = None
    client: str | None = None
    confidence: float | None = None
    problem: str | None = None

    @property
    def held(self) -> str | None:
        """The name that the model holds it under."""
        return self.made.held if self.made else self.name


@dataclass(eq=False)
class ServedText:
    """One text to be written.

    Attributes:
        ids: tokens of the prompt.
        sampling: sampling options.
        deliver: called in the scheduler's thread with each piece that is not empty; after an exception nothing follows.
        chosen: adjustment to write it with.
    """

    ids: Sequence[int]
    sampling: Sampling
    deliver: Callable[[Piece | Exception], None]
    chosen: Chosen = field(default_factory=Chosen)
    cancelled: bool = False
    pieces: Iterator[Piece] | None = None
    last: float = field(default_factory=time.monotonic)  # time of the request, then of the last token
    written: int = 0
