"""Which adjustment each text is written with, and the turn-taking between them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moqa.adjustment.drift import State
from moqa.errors import MoqaError
from moqa.generation import Piece
from moqa.serve.metrics import Metrics
from moqa.serve.refusal import RefusalError
from moqa.serve.text import Chosen, ServedText

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moqa.runtime.adjusted import Adjustments

NONE = "(none)"  # as a metric's label; no adjustment can be named so


class Adjusting:
    """Adjustments that are given when the server starts, or none.

    >>> adjusting = Adjusting(model, metrics, ["runs/german"])
    >>> adjusting.choose(None, explicit=False).name
    'german'

    Args:
        model: that writes; only the scheduler's thread switches it.
        metrics: to count in.
        folders: of adjustments; the first is what requests get that say nothing.

    Raises:
        MoqaError: if one is damaged or does not fit the model.
    """

    def __init__(self, model: "PreTrainedModel", metrics: Metrics, folders: Sequence[str | Path] = ()) -> None:
        # an original model has none
        self._held: Adjustments | None = getattr(model, "adjustments", None)
        if folders and self._held is None:
            raise MoqaError(f"--adjust {folders[0]} needs a checkpoint", "this is an original model")
        names = [self._held.hold(folder) for folder in folders] if self._held else []
        self._default = Chosen(names[0] if names else None)
        self._metrics = metrics
        metrics.adjustments.set_function(lambda: len(self.names))

    @property
    def names(self) -> list[str]:
        """Adjustments that a request may choose."""
        return self._held.names if self._held else []

    @property
    def drift(self) -> State | None:
        """What recent text is; None if that is not watched."""
        return None

    def choose(self, asked: str | None, explicit: bool) -> Chosen:
        """The adjustment of a request.

        Args:
            asked: its name; None for the checkpoint as it is.
            explicit: whether the request says so; one that does not gets the default.

        Raises:
            RefusalError: 400 if none of that name is held.
        """
        return self._find(asked) if explicit else self._default

    def count(self, chosen: Chosen) -> None:
        """Note that a request is written with an adjustment."""
        self._metrics.adjusted.labels(self._label(chosen)).inc()

    def written(self, job: ServedText, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """Pieces of a text, each computed with the text's own adjustment, whatever was computed before it."""
        while True:
            if self._held is not None:
                self._held.switch(job.chosen.name)
            piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def close(self) -> None:
        """Let go of threads."""

    def _find(self, asked: str | None) -> Chosen:
        if asked is not None and asked not in self.names:
            held = ", ".join(self.names) or "none"
            raise RefusalError(
                400, f"no such adjustment here; held: {held}", param="adjustment", code="adjustment_not_found"
            )
        return Chosen(asked, explicit=True)

    def _label(self, chosen: Chosen) -> str:
        return chosen.name or NONE
