"""Encodings: how integers or codes and their scales are stored. One file each, and one word here.

`ENCODINGS` are those of checkpoints. Plans for other engines also have theirs, which `find_encoding` knows, too.
"""

from moqa.format.encodings.coded import Coded
from moqa.format.encodings.encoding import Encoding, TensorSpec
from moqa.format.encodings.ggml import GGML_TYPES
from moqa.format.encodings.integers import Integers
from moqa.format.encodings.unquantized import Unquantized

_ALL: tuple[Encoding, ...] = (Integers(), Coded("table"), Coded("trellis"), Unquantized())
ENCODINGS: dict[str, Encoding] = {encoding.name: encoding for encoding in _ALL}


def find_encoding(name: str) -> Encoding | None:
    """The encoding of a name, in checkpoints or in files of other engines; None if there is none.

    >>> find_encoding("trellis").name, find_encoding("q4_k").name, find_encoding("awq")
    ('trellis', 'q4_k', None)
    """
    return ENCODINGS.get(name) or GGML_TYPES.get(name)


__all__ = ["ENCODINGS", "GGML_TYPES", "Encoding", "TensorSpec", "find_encoding"]
