"""Quantization-aware training of any torch module: it computes with the numbers that will be stored."""

from typing import TYPE_CHECKING

from moqa.lazy import lazily

if TYPE_CHECKING:
    from moqa.qat.inputs import Inputs
    from moqa.qat.model import FakeQuantized, prepare
else:
    __getattr__, __dir__ = lazily(__name__, __file__)

__all__ = ["FakeQuantized", "Inputs", "prepare"]
