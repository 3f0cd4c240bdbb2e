"""Where texts come from: files, folders and datasets of the Hub."""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moqa.data.images import Images, is_image, name_and_source
from moqa.errors import MoqaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORM = "NAME=SOURCE", "wiki=wiki.txt"
_HUB = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(:(?P<field>[^:#]+))?(#(?P<split>[^#]+))?")
_FILE_SUFFIXES = {".txt", ".md", ".json", ".jsonl", ".parquet", ".csv"}  # never the end of a dataset id
_DEFAULT_FIELDS = ("text", "messages", "conversations")
_CHAT_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names -> those of chat templates


@dataclass(frozen=True)
class Distribution:
    """A named source of texts."""

    name: str
    texts: tuple[str, ...]  # documents, in order
    origin: str  # what the user typed after NAME=

    @property
    def digest(self) -> str:
        """Hash of the whole text, which identifies it."""
        return hashlib.sha256("\0".join(self.texts).encode()).hexdigest()


Source = Distribution | Images
Data = Sequence[Source] | Sequence[str] | Mapping[str, str | Path | Sequence[str]]


def read_distribution(spec: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Distribution:
    """Read one distribution from a file, a folder or the Hub.

    >>> read_distribution("wiki=wiki.txt").name
    'wiki'
    >>> read_distribution("chat=dialogues.jsonl:messages", tokenizer)  # doctest: +SKIP

    Args:
        spec: NAME=SOURCE or NAME=SOURCE:field. SOURCE is a text file (one document), a folder (one document for each
            .txt file in it), a .jsonl or .parquet file (one document for each record), or a dataset of the Hub as
            org/name, org/name:field or org/name:field#split.
        tokenizer: turns chat records into text with its chat template; not needed for other records.

    Documents without any text are left out.

    Raises:
        MoqaError: if the source is missing, unreadable, empty, or a record of it has no text in the field.
    """
    name, source = name_and_source(spec, *_FORM)
    try:
        texts = tuple(text for text in _read(source, tokenizer) if text.strip())
    except MoqaError as error:
        raise MoqaError(spec, str(error)) from None
    except OSError as error:
        raise MoqaError(spec, f"cannot be read ({error.strerror or _one_line(error)})") from None
    if not texts:
        raise MoqaError(spec, "holds no text")
    return Distribution(name, texts, source)


def as_distributions(data: Data, tokenizer: PreTrainedTokenizerBase | None = None) -> list[Distribution]:
    """Distributions of text from any form of data that functions of moqa accept.

    >>> [d.name for d in as_distributions({"wiki": "wiki.txt", "notes": ["a text", "another"]})]
    ['wiki', 'notes']

    Args:
        data: distributions, NAME=SOURCE specs, or name -> source as on the command line, or name -> list of texts.
        tokenizer: turns chat records into text.

    Raises:
        MoqaError: as in `read_distribution`.
    """
    if isinstance(data, Mapping):
        return [
            read_distribution(f"{name}={value}", tokenizer)
            if isinstance(value, str | Path)
            else Distribution(name, tuple(value), f"{len(value)} texts")
            for name, value in data.items()
        ]
    data = [data] if isinstance(data, str) else data
    specs = [item for item in data if isinstance(item, str)]
    if specs:
        return read_distributions(specs, tokenizer)
    return [as_text(item) for item in data if not isinstance(item, str)]


def as_text(source: Source) -> Distribution:
    """The same distribution, checked to be text.

    Raises:
        MoqaError: if it holds images.
    """
    if isinstance(source, Images):
        raise MoqaError(f"{source.name}={source.origin} holds images", "a causal language model reads text")
    return source


def read_distributions(specs: Sequence[str], tokenizer: PreTrainedTokenizerBase | None = None) -> list[Distribution]:
    """Read several distributions with different names.

    >>> [d.name for d in read_distributions(["wiki=wiki.txt", "novels=novels.txt"])]
    ['wiki', 'novels']

    Args:
        specs: one NAME=SOURCE each, as in `read_distribution`.
        tokenizer: turns chat records into text with its chat template; not needed for other records.

    Raises:
        MoqaError: if two have the same name, or one cannot be read.
    """
    first: dict[str, str] = {}
    for spec in specs:
        name, _ = name_and_source(spec, *_FORM)
        if name in first:
            raise MoqaError(f"{first[name]} and {spec} are both named '{name}'", "give each its own name")
        first[name] = spec
    return [read_distribution(spec, tokenizer) for spec in specs]


def _read(source: str, tokenizer: PreTrainedTokenizerBase | None) -> Iterable[str]:
    path, field = Path(source).expanduser(), None
    if not path.exists():  # a path that exists as typed wins over a field after ':'
        head, _, field = source.rpartition(":")
        path = Path(head).expanduser()
        if not (head and field and path.exists()):
            return _texts(_hub_records(source), _hub_field(source), tokenizer)
    suffix = "" if path.is_dir() else path.suffix.lower()
    if suffix == ".jsonl":
        return _texts(_jsonl_records(path), field, tokenizer)
    if suffix == ".parquet":
        return _texts(_parquet_records(path, field), field, tokenizer)
    if field:
        raise MoqaError(f"{path} has no fields", f"leave out ':{field}', or give a .jsonl or .parquet file")
    if not path.is_dir():
        return [_decoded(path.read_bytes(), str(path))]
    files = sorted(file for file in path.rglob("*.txt") if file.is_file())
    if not files:
        if any(is_image(file) for file in path.rglob("*")):
            raise MoqaError(f"the folder {path} holds images", "a causal language model reads text")
        raise MoqaError(f"the folder {path} holds no .txt file", "give a folder of .txt files, or one file")
    return [_decoded(file.read_bytes(), str(file)) for file in files]


def _decoded(data: bytes, where: str, offset: int = 0) -> str:
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise MoqaError(f"{where} is not UTF-8 at byte {offset + error.start}", "convert it, e.g. with iconv") from None


def _jsonl_records(path: Path) -> Iterator[tuple[str, Any]]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = _decoded(line, f"line {number}", offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                yield f"line {number}", json.loads(text)
            except (ValueError, RecursionError) as error:
                raise MoqaError(f"line {number} is not JSON", str(error)) from None


def _parquet_records(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MoqaError("a .parquet file needs the package pyarrow", "pip install 'moqa[data]'") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = (field,) if field else _DEFAULT_FIELDS
            columns = [name for name in wanted if name in file.schema_arrow.names] or None  # None: all, for the error
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", record
    except pyarrow.ArrowException as error:
        raise MoqaError("it is not a readable .parquet file", _one_line(error)) from None


def _hub_field(source: str) -> str | None:
    dataset = _HUB.fullmatch(source)
    return dataset["field"] if dataset else None


def _hub_records(source: str) -> Iterator[tuple[str, Any]]:
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
            "there is no such file or folder, and loading it from the Hub as a dataset failed", _one_line(error)
        ) from None
    for number, record in enumerate(records, 1):
        yield f"row {number}", record


def _texts(
    records: Iterable[tuple[str, Any]], field: str | None, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[str]:
    for where, record in records:
        if not isinstance(record, Mapping):
            raise MoqaError(f"{where} is not a record", 'each line needs fields, like {"text": "..."}')
        key = field or next((name for name in _DEFAULT_FIELDS if name in record), "text")
        if key not in record:
            raise MoqaError(f"{where} has no field '{key}'", f"its fields are {', '.join(map(str, record)) or 'none'}")
        value = record[key]
        if isinstance(value, list):
            value = _chat_text(value, f"{where}, field '{key}'", tokenizer)
        if not isinstance(value, str):
            kind = type(value).__name__
            raise MoqaError(f"{where}, field '{key}' is of type {kind}", "a text or a list of messages is needed")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON escapes can stand for lone surrogates, which UTF-8 cannot hold
            raise MoqaError(f"{where}, field '{key}' is not valid Unicode", _one_line(error)) from None
        yield value


def _chat_text(messages: list, where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if not messages:
        return ""
    chat = []
    for message in messages:
        if isinstance(message, Mapping) and {"from", "value"} <= message.keys():
            message = {"role": _CHAT_ROLES.get(message["from"], message["from"]), "content": message["value"]}
        if not (isinstance(message, Mapping) and {"role", "content"} <= message.keys()):
            raise MoqaError(f"{where} is a list, but not of messages", 'each needs a "role" and a "content"')
        chat.append(message)
    if tokenizer is None:
        raise MoqaError(f"{where} is a chat", "it needs a model's tokenizer to become text, and none was given")
    if not tokenizer.chat_template:
        raise MoqaError(
            f"{where} is a chat, but the tokenizer {tokenizer.name_or_path} has no chat template",
            "give plain text, or a model with a chat template",
        )
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception as error:  # templates are programs and raise any error
        raise MoqaError(
            f"{where} does not fit the chat template of {tokenizer.name_or_path}", _one_line(error)
        ) from None


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__
