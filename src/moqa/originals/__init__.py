"""Original models on disk; those stored in FP8 or MXFP4 are read as the plain tensors that they stand for."""

from moqa.originals.reader import OriginalReader, find_format

__all__ = ["OriginalReader", "find_format"]
