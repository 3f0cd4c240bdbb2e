"""Load a model that can generate: a checkpoint or an original model."""

from pathlib import Path
from typing import TYPE_CHECKING

from moqa.errors import MoqaError
from moqa.format.reader import is_checkpoint
from moqa.models.load import read_config, read_generation_config
from moqa.models.view import open_model
from moqa.originals import folder as original
from moqa.originals.hub import on_disk
from moqa.runtime.load import load
from moqa.tasks import check_language_model
from moqa.tasks.causal_lm import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_any(
    model: str | Path, adjustment: str | Path | None = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a checkpoint with packed weights, or an original model in float32.

    >>> model, tokenizer = load_any("runs/out")

    Args:
        model: folder of a checkpoint or of an original model, or a Hub id.
        adjustment: folder of an adjustment to apply to the checkpoint.

    Raises:
        MoqaError: if the model is missing or damaged, or is not a language model.
    """
    folder = on_disk(model)
    if is_checkpoint(folder):
        check_language_model(read_config(folder, packed=True), model)
        loaded, tokenizer = load(folder)
        if adjustment is not None:
            loaded.apply(adjustment)
        return loaded, tokenizer
    if adjustment is not None:
        raise MoqaError(f"{model} is not a checkpoint", f"an adjustment such as {adjustment} needs one")
    folder = original.locate(folder)
    check_language_model(read_config(folder), folder)
    loaded = open_model(folder).model
    read_generation_config(loaded, folder)
    return loaded, load_tokenizer(folder)
