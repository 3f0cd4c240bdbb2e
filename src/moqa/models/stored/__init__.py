"""Originals that are stored in blocks of small numbers with a scale each, read as the plain tensors they stand for."""

from moqa.models.stored.folder import Stored, find_format

__all__ = ["Stored", "find_format"]
