"""Encodings: how integers or codes and their scales are stored. One file each, and one word here."""

from moqa.format.encodings.coded import Coded
from moqa.format.encodings.encoding import Encoding, TensorSpec
from moqa.format.encodings.integers import Integers
from moqa.format.encodings.unquantized import Unquantized

_ALL: tuple[Encoding, ...] = (Integers(), Coded("table"), Coded("trellis"), Unquantized())
ENCODINGS: dict[str, Encoding] = {encoding.name: encoding for encoding in _ALL}

__all__ = ["ENCODINGS", "Encoding", "TensorSpec"]
