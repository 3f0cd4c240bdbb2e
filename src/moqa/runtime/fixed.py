"""What a packed model cannot do: refused in one line, before anything changes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from moqa.errors import MoqaError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def keep_packed(model: "PreTrainedModel", folder: Path) -> None:
    """Let a model refuse other dtypes and to be written as another format; devices may change.

    >>> model.half()
    Traceback (most recent call last):
    moqa.errors.MoqaError: a packed model that computes in float32 cannot be cast: load it again with ...

    Args:
        model: with packed units.
        folder: of its checkpoint.
    """
    from transformers import PreTrainedModel

    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part._apply = partial(_moved, part)  # what half, float, to and the like all call
    copies = f"copy or upload its folder, {folder}"
    refused = {"save_pretrained": copies, "push_to_hub": copies, "dequantize": "use the original",
               "resize_token_embeddings": "resize the original and quantize it"}  # fmt: skip
    for name, remedy in refused.items():
        setattr(model, name, partial(_refuse, name, remedy))


def _moved(model: "PreTrainedModel", function: Callable[[Tensor], Tensor], recurse: bool = True) -> "PreTrainedModel":
    dtype = model.dtype
    if function(torch.empty(0, dtype=dtype)).dtype != dtype:
        raise MoqaError(
            f"a packed model that computes in {str(dtype).removeprefix('torch.')} cannot be cast",
            "load it again with dtype=torch.float32 or torch.bfloat16",
        )

    # what has a wider dtype than the model, such as the biases of some routers, keeps it
    def moved(tensor: Tensor) -> Tensor:
        new = function(tensor)
        return new if new.dtype == tensor.dtype else tensor.to(new.device)

    applied: PreTrainedModel = type(model)._apply(model, moved, recurse)
    return applied


def _refuse(name: str, remedy: str, *_: Any, **__: Any) -> NoReturn:
    raise MoqaError(f"a packed model has no {name}", remedy)
