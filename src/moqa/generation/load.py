"""Load a model that can generate: a checkpoint or an original model."""

from pathlib import Path
from typing import TYPE_CHECKING

from moqa.errors import MoqaError
from moqa.format.reader import is_checkpoint
from moqa.integrations.lora import add_lora
from moqa.models.load import read_config, read_generation_config
from moqa.models.view import open_model
from moqa.originals import folder as original
from moqa.originals.hub import on_disk
from moqa.runtime.growing import round_cache
from moqa.runtime.load import load
from moqa.tasks import check_language_model
from moqa.tasks.causal_lm import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_any(
    model: str | Path,
    adjustment: str | Path | None = None,
    lora: str | Path | None = None,
    kv_bits: int | None = None,
    width: int | None = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a checkpoint with packed weights, or an original model in float32.

    >>> model, tokenizer = load_any("runs/out")

    Args:
        model: folder of a checkpoint or of an original model, or a Hub id.
        adjustment: folder of an adjustment to apply to the checkpoint.
        lora: folder of a LoRA that a checkpoint computes with, see `moqa.integrations.lora`.
        kv_bits: of keys and values in the cache: 8, or None, as they are computed.
        width: of a checkpoint with nested widths, see `moqa.load`.

    Raises:
        MoqaError: if the model or the LoRA is missing or damaged, or the model is not a language model.
    """
    folder = on_disk(model)
    if is_checkpoint(folder):
        check_language_model(read_config(folder, packed=True), model)
        loaded, tokenizer = load(folder, width=width)
        if lora is not None:
            add_lora(loaded, lora)
        if adjustment is not None:
            loaded.apply(adjustment)
        round_cache(loaded, kv_bits)
        return loaded, tokenizer
    for what, given in (("an adjustment", adjustment), ("a LoRA", lora), ("a width", width)):
        if given is not None:
            raise MoqaError(f"{model} is not a checkpoint", f"{what} such as {given} needs one")
    folder = original.locate(folder)
    check_language_model(read_config(folder), folder)
    original_model = open_model(folder).model
    read_generation_config(original_model, folder)
    round_cache(original_model, kv_bits)
    return original_model, load_tokenizer(folder)
