"""Chooses the adjustment of each text, and switches the model between texts."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moqa.adjustment.drift import State
from moqa.errors import MoqaError
from moqa.generation import Piece
from moqa.serve.metrics import Metrics
from moqa.serve.refusal import RefusalError
from moqa.serve.text import Chosen, ServedText

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moqa.runtime.adjusted import Adjustments

NONE = "(none)"  # label of metrics; no adjustment can have this name


class Adjusting:
    """Adjustments that are given when the server starts; there may be none.

    >>> adjusting = Adjusting(model, Metrics())
    >>> adjusting.choose(None, explicit=False, client=None).name is None
    True

    Args:
        model: the served model; only the scheduler's thread switches its adjustment.
        metrics: metrics of the server.
        folders: folders of adjustments; the first is the default for requests that name none.

    Attributes:
        by_client: whether clients have to be told apart.

    Raises:
        MoqaError: if an adjustment is damaged or does not fit the model.
    """

    def __init__(self, model: "PreTrainedModel", metrics: Metrics, folders: Sequence[str | Path] = ()) -> None:
        self._model = model
        # an original model has no adjustments
        self._held: Adjustments | None = getattr(model, "adjustments", None)
        if folders and self._held is None:
            raise MoqaError(f"--adjust {folders[0]} needs a checkpoint", "this is an original model")
        names = [self._held.hold(folder) for folder in folders] if self._held else []
        self._default = Chosen(names[0] if names else None)
        self._metrics, self.by_client = metrics, False
        metrics.adjustments.set_function(lambda: self.count)

    @property
    def count(self) -> int:
        """Number of adjustments that requests may choose."""
        return len(self._held.names) if self._held else 0

    @property
    def variants(self) -> Sequence[str]:
        """Variants of a mixture that requests may name; none if no mixture is served."""
        return ()

    def model(self, job: ServedText) -> "PreTrainedModel":  # noqa: ARG002
        """The model that writes a text that begins."""
        return self._model

    def told(self, jobs: Sequence[ServedText]) -> dict[str, Any]:
        """Fields of a response that say what its texts were written with."""
        chosen = jobs[0].chosen
        return {"adjustment": chosen.name, "drift": self.drift(chosen)}

    def drift(self, chosen: Chosen) -> State | None:  # noqa: ARG002
        """Whether recent text of a request's client is known, drifting or novel; None if drift is not detected."""
        return None

    def choose(self, asked: str | None, explicit: bool, client: str | None) -> Chosen:  # noqa: ARG002
        """Choose the adjustment of a request.

        Args:
            asked: name in the request; None for the checkpoint without adjustment.
            explicit: whether the request has this field; otherwise it gets the default.
            client: whose request it is; None if nothing says so.

        Raises:
            RefusalError: 400 if there is no adjustment of that name.
        """
        return self._checked(asked, self._held.names if self._held else []) if explicit else self._default

    def note(self, chosen: Chosen) -> None:
        """Count a request for the adjustment that it is written with."""
        self._metrics.adjusted.labels(self._label(chosen)).inc()

    def written(self, job: ServedText, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """Pieces of a text; before each, the model is switched to the adjustment of this text."""
        held = self._held
        return pieces if held is None else before_each(pieces, lambda: held.switch(job.chosen.held))

    def close(self) -> None:
        """Stop threads."""

    @staticmethod
    def _checked(asked: str | None, names: Sequence[str]) -> Chosen:
        if asked is not None and asked not in names:
            raise RefusalError(
                400, f"no such adjustment: the server has {', '.join(names) or 'none'}", param="adjustment",
                code="adjustment_not_found",
            )  # fmt: skip
        return Chosen(asked, explicit=True)

    def _label(self, chosen: Chosen) -> str:
        return chosen.name or NONE


def before_each(pieces: Iterator[Piece], do: Callable[[], None]) -> Iterator[Piece]:
    """Pieces of a text, with something to do before each is made; between them others' texts may be written."""
    while True:
        do()
        piece = next(pieces, None)
        if piece is None:
            return
        yield piece
