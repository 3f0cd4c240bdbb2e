"""Load an image classifier, whatever it is stored as, with what makes pixels for it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moqa.errors import MoqaError
from moqa.format.reader import is_checkpoint
from moqa.mixture.load import load
from moqa.mixture.merged import is_merged
from moqa.mixture.record import is_mixture, read_mixture
from moqa.models.load import read_config
from moqa.models.view import open_model
from moqa.originals import folder as original
from moqa.originals.hub import on_disk
from moqa.tasks import Task, task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def classifies(model: str | Path) -> bool:
    """Whether a mixture, a checkpoint or an original is an image classifier.

    >>> classifies("reference/image/model"), classifies("reference/model")
    (True, False)

    Raises:
        MoqaError: if it is none of moqa's tasks, or is not there.
    """
    return not is_merged(model) and _found(model)[1].name == "image_classification"


def load_classifier(model: str | Path, width: int | None = None) -> "tuple[PreTrainedModel, Any]":
    """Load an image classifier: a mixture, a checkpoint or an original, and what makes pixels for it.

    >>> model, reader = load_classifier("reference/image/model")
    >>> reader.label("airplane")
    0

    Args:
        model: folder, or the Hub id of a checkpoint or an original.
        width: of a checkpoint with nested widths, see `moqa.load`.

    Raises:
        MoqaError: if it is missing or damaged, or not a checkpoint that has such a width.
    """
    folder, task = _found(model)
    if is_mixture(model) or is_checkpoint(folder):
        loaded = load(model if is_mixture(model) else folder, width=width)[0]
    elif width is None:
        loaded = open_model(folder).model
    else:
        raise MoqaError(f"{model} is not a checkpoint", f"a width such as {width} needs one")
    return loaded, task.reader(folder)


def _found(model: str | Path) -> tuple[Path, Task]:
    """The folder that has a model's configuration, and the model's task."""
    folder = Path(model) / read_mixture(model).router.base if is_mixture(model) else on_disk(model)
    packed = is_checkpoint(folder)
    folder = folder if packed else original.locate(folder)
    return folder, task_of(read_config(folder, packed), folder)
