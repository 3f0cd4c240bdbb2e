"""Files of llama.cpp (GGUF): which models they can hold, what they call tensors, and how long they are."""

from moqa.gguf.families import Family, find_family
from moqa.gguf.file import GgufFile, GgufTensor

__all__ = ["Family", "GgufFile", "GgufTensor", "find_family"]
