"""Originals that are stored in blocks of small numbers with a scale each, read as the plain tensors they stand for."""

from moqa.originals.reader import OriginalReader, find_format

__all__ = ["OriginalReader", "find_format"]
