"""Schemes: how one unit's weights are stored, and exactly how many bytes that takes."""

import math
from collections.abc import Mapping

from pydantic import Field, model_validator
from torch import Tensor

from moqa.format.encodings import ENCODINGS, GGML_TYPES, Encoding, TensorSpec, find_encoding
from moqa.format.encodings.encoding import Parameters
from moqa.format.levels import UPPER_LEVELS
from moqa.format.tiles import KEEP_WIDTH, WIDTHS

DEFAULT_ENCODING = "int"


class Scheme(Parameters, frozen=True):
    """How one unit's weights are stored.

    >>> Scheme(width=3).stored_bytes((256, 256))
    27648

    Width 16 keeps the matrix as 16-bit floating point; the other fields then do not matter.
    """

    encoding: str = Field(
        default=DEFAULT_ENCODING, description="how integers or codes and their scales are stored",
        exclude_if=lambda name: name == DEFAULT_ENCODING,
    )  # fmt: skip

    @model_validator(mode="after")
    def _check(self) -> "Scheme":
        if self.width not in (*WIDTHS, KEEP_WIDTH):
            raise ValueError(f"width {self.width} is not supported; widths are 1 to 8, and 16 for no quantization")
        if self.symmetric and self.width == 1:
            raise ValueError("width 1 cannot be symmetric: one of its two levels would be zero")
        encoding = find_encoding(self.encoding)
        if encoding is None:
            raise ValueError(f"encoding {self.encoding} is unknown; known are {', '.join((*ENCODINGS, *GGML_TYPES))}")
        widths = encoding.widths
        if self.encoding != DEFAULT_ENCODING and not self.is_unquantized:
            if self.width not in widths:
                there_are = f"it has widths {', '.join(map(str, widths))}"
                raise ValueError(f"encoding {self.encoding} has no width {self.width}; {there_are}")
            if self.symmetric:
                raise ValueError(f"encoding {self.encoding} is always symmetric: leave `symmetric` out")
        return self

    @property
    def storage(self) -> Encoding:
        """The encoding by which the unit is stored."""
        encoding = find_encoding("unquantized" if self.is_unquantized else self.encoding)
        assert encoding is not None
        return encoding

    @property
    def is_unquantized(self) -> bool:
        """Whether the unit stays in floating point."""
        return self.width == KEEP_WIDTH

    @property
    def is_coded(self) -> bool:
        """Whether the unit is stored as codes of levels, and not as integers on a grid."""
        return self.encoding in UPPER_LEVELS and not self.is_unquantized

    @property
    def is_foreign(self) -> bool:
        """Whether only files of another engine store units so: moqa exports them, and does not run them."""
        return self.encoding in GGML_TYPES and not self.is_unquantized

    def holds(self, shape: tuple[int, int]) -> bool:
        """Whether [out, in] weights can be stored so: ggml's rows are whole blocks.

        >>> Scheme(encoding="q4_k", width=4).holds((256, 1408)), Scheme(encoding="q8_0", width=8).holds((256, 1408))
        (False, True)
        """
        return not self.is_foreign or shape[1] % GGML_TYPES[self.encoding].weights == 0

    def tensors(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Dtype and shape of every tensor that stores a unit of [out, in] weights, by suffix.

        >>> Scheme(width=3).tensors((256, 100))["p0"]
        (torch.uint8, (16, 4, 128))
        """
        return self.storage.tensors(self, shape)

    def among(self, stored: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> dict[str, Tensor]:
        """The tensors, by suffix, of a unit of [out, in] weights among those of a file.

        >>> weight = torch.zeros(2, 32, dtype=torch.bfloat16)
        >>> list(Scheme(width=16).among({"q_proj.weight": weight}, "q_proj", (2, 32)))
        ['weight']
        """
        return {suffix: stored[f"{name}.{suffix}"] for suffix in self.tensors(shape)}

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a unit of [out, in] weights with its scales and zero-points."""
        return sum(dtype.itemsize * math.prod(stored) for dtype, stored in self.tensors(shape).values())
