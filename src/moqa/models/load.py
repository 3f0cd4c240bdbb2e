"""Open a model folder or Hub id; refuse what transformers would quietly repair with random numbers."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moqa.errors import MoqaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerBase":
    """Tokenizer of a model folder.

    >>> load_tokenizer("reference/model").vocab_size
    8192

    Raises:
        MoqaError: if the folder has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MoqaError(f"{folder} has no tokenizer that transformers can read", _first_line(error)) from None


def load_original(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """Original model of a folder, ready to evaluate.

    Raises:
        MoqaError: if it is no causal language model, lacks tensors that its architecture needs, or holds ones that it
            does not know.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True
        )
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise MoqaError(f"{folder} is not a causal language model", _first_line(error)) from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            names = sorted(str(key) for key in report[kind])
            raise MoqaError(f"{folder} has {len(names)} {kind.replace('_', ' ')}", f"e.g. {names[0]}")
    return model.eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
