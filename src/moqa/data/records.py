"""Records of files and of datasets of the Hub, each with the place where it was found."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moqa.errors import MoqaError, one_line

_HUB = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(:(?P<field>[^:#]+))?(#(?P<split>[^#]+))?")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
# never the end of a dataset id
_FILE_SUFFIXES = {".txt", ".md", *RECORD_SUFFIXES}

Record = tuple[str, Any]  # where it is, and what


def file_records(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    """Records of a file that ends in one of `RECORD_SUFFIXES`.

    >>> next(file_records(Path("dialogues.jsonl"), ["text"]))  # doctest: +SKIP
    ('line 1', {'text': 'Hello'})

    Args:
        path: of the file.
        columns: fields that will be used; a .parquet file is read for them only.

    Raises:
        MoqaError: if it cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path, columns)
    if suffix == ".json":
        return _json(path)
    return _table(path, "\t" if suffix == ".tsv" else ",") if suffix in {".csv", ".tsv"} else _lines(path)


def hub_field(source: str) -> str | None:
    """Field in a source like `org/name:field#split`."""
    dataset = _HUB.fullmatch(source)
    return dataset["field"] if dataset else None


def hub_records(source: str) -> Iterator[Record]:
    """Records of a dataset of the Hub.

    Raises:
        MoqaError: if the source is not one, or it cannot be loaded.
    """
    dataset = _HUB.fullmatch(source)
    if not dataset or Path(dataset["id"]).suffix.lower() in _FILE_SUFFIXES:
        raise MoqaError("there is no such file or folder", "give a file, a folder, or a dataset of the Hub as org/name")
    try:
        from datasets import load_dataset
    except ImportError:
        raise MoqaError(
            "there is no such file or folder, and a dataset of the Hub needs the package datasets",
            "pip install 'moqa[data]'",
        ) from None
    try:
        records = load_dataset(dataset["id"], split=dataset["split"] or "train")
    except Exception as error:  # the network, the Hub and a dataset's files raise many kinds
        raise MoqaError(
            "there is no such file or folder, and loading it from the Hub as a dataset failed", one_line(error)
        ) from None
    for number, record in enumerate(records, 1):
        yield f"row {number}", record


def decoded(data: bytes, where: str, offset: int = 0) -> str:
    """Text of bytes in UTF-8, without a byte order mark.

    Raises:
        MoqaError: if they are not UTF-8.
    """
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise MoqaError(f"{where} is not UTF-8 at byte {offset + error.start}", "convert it, e.g. with iconv") from None


def _lines(path: Path) -> Iterator[Record]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = decoded(line, f"line {number}", offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                yield f"line {number}", json.loads(text)
            except (ValueError, RecursionError) as error:
                raise MoqaError(f"line {number} is not JSON", str(error)) from None


def _json(path: Path) -> Iterator[Record]:
    text = decoded(path.read_bytes(), str(path))
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MoqaError(f"{path} is not JSON", f"{error}; a file of JSON lines ends in .jsonl") from None
    if not isinstance(records, list):
        raise MoqaError(f"{path} holds one {type(records).__name__}", "give a list of records, or a .jsonl file")
    for number, record in enumerate(records, 1):
        yield f"record {number}", record


def _table(path: Path, delimiter: str) -> Iterator[Record]:
    text = decoded(path.read_bytes(), str(path))
    rows = csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
    try:
        for record in rows:
            if None in record or None in record.values():
                raise MoqaError(f"line {rows.line_num} has another number of fields than the first line", "repair it")
            yield f"line {rows.line_num}", record
    except csv.Error as error:
        raise MoqaError(f"line {rows.line_num} is not a line of a {path.suffix} file", str(error)) from None


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MoqaError("a .parquet file needs the package pyarrow", "pip install 'moqa[data]'") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = [name for name in columns if name in file.schema_arrow.names] or None  # None: all, for the error
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", record
    except pyarrow.ArrowException as error:
        raise MoqaError("it is not a readable .parquet file", one_line(error)) from None
