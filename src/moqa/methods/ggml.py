"""Rounding to the block types of ggml, by its own encoders: files for llama.cpp are made of these."""

from types import ModuleType

import torch
from torch import Tensor

from moqa.errors import MoqaError
from moqa.format.encodings import GGML_TYPES


def encoders() -> ModuleType:
    """ggml's encoders as the package `libgguf` has them.

    >>> encoders().__name__
    'libgguf'

    Raises:
        MoqaError: if the package is not installed.
    """
    try:
        import gguf  # noqa: F401  (decodes them)
        import libgguf
    except ImportError as error:
        raise MoqaError(f"types of llama.cpp need the package {error.name}", "pip install 'moqa[gguf]'") from None
    return libgguf


def encode(weights: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """[out, row bytes] blocks of [out, in] weights, uint8.

    >>> encode(torch.randn(4, 256), "q4_k").shape
    torch.Size([4, 144])

    Args:
        weights: float32; a multiple of the type's block long.
        kind: name of the type.
        importance: [in] weight of each input's squared error, float32; None lets the encoder choose.
    """
    # it reads the memory as rows of floats
    rows = weights.contiguous().numpy()
    seen = None if importance is None else importance.contiguous().numpy()
    return torch.from_numpy(encoders().quantize_rows(rows, GGML_TYPES[kind].number, imatrix=seen))


def rounded_as(weights: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """[out, in] weights after rounding to a type, float32; rows are filled up with zeros to whole blocks.

    >>> rounded_as(torch.randn(4, 100), "q8_0").shape
    torch.Size([4, 100])
    """
    short = -weights.shape[1] % GGML_TYPES[kind].weights
    filled = torch.nn.functional.pad(weights, (0, short))
    blocks = encode(filled, kind, None if importance is None else torch.nn.functional.pad(importance, (0, short)))
    return torch.from_numpy(
        encoders().dequantize_rows(blocks.numpy(), GGML_TYPES[kind].number, n_per_row=filled.shape[1])
    )[:, : weights.shape[1]]
