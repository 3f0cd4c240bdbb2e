"""Load an image classifier, whatever it is stored as, with what makes pixels for it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def load_classifier(model: str | Path) -> "tuple[PreTrainedModel, Any]":
    """Load an image classifier: a mixture, a checkpoint or an original, and what makes pixels for it.

    >>> model, reader = load_classifier("reference/image/model")
    >>> reader.label("airplane")
    0

    Raises:
        MoqaError: if it is missing or damaged.
    """
    folder, task = _found(model)
    packed = is_mixture(model) or is_checkpoint(folder)
    loaded = load(model if is_mixture(model) else folder)[0] if packed else open_model(folder).model
    return loaded, task.reader(folder)


def _found(model: str | Path) -> tuple[Path, Task]:
    """The folder that has a model's configuration, and the model's task."""
    folder = Path(model) / read_mixture(model).router.base if is_mixture(model) else on_disk(model)
    packed = is_checkpoint(folder)
    folder = folder if packed else original.locate(folder)
    return folder, task_of(read_config(folder, packed), folder)
