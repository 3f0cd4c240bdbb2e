"""Where texts come from: files, folders and datasets of the Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moqa.data.chat import chat_text
from moqa.data.demonstrations import Demonstrations
from moqa.data.images import Images, is_image, name_and_source
from moqa.data.records import RECORD_SUFFIXES, decoded, file_records, hub_field, hub_records
from moqa.errors import MoqaError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORM = "NAME=SOURCE", "wiki=wiki.txt"
_CHAT_FIELDS = ("messages", "conversations")
_DEFAULT_FIELDS = ("text", *_CHAT_FIELDS)
_CHAT_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names -> those of chat templates
# text files whose markup is not the text
_MARKED_UP = {".htm", ".html", ".ipynb", ".rtf", ".xml", ".yaml", ".yml"}


@dataclass(frozen=True)
class Distribution:
    """A named source of texts."""

    name: str
    texts: tuple[str, ...]  # documents, in order
    origin: str  # what the user typed after NAME=

    def __repr__(self) -> str:
        """One line without the texts."""
        size = sum(map(len, self.texts))
        return f"<Distribution {self.name} from {self.origin}: {len(self.texts)} documents, {size} characters>"

    @property
    def digest(self) -> str:
        """Hash of the whole text, which identifies it."""
        return hashlib.sha256("\0".join(self.texts).encode()).hexdigest()


Source = Distribution | Images | Demonstrations
Data = Sequence[Source] | Sequence[str] | Mapping[str, str | Path | Sequence[str]]


def read_distribution(spec: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Distribution:
    """Read one distribution from a file, a folder or the Hub.

    >>> read_distribution("wiki=wiki.txt").name
    'wiki'
    >>> read_distribution("chat=dialogues.jsonl:messages", tokenizer)  # doctest: +SKIP

    Args:
        spec: NAME=SOURCE or NAME=SOURCE:field. SOURCE is a text file (one document), a folder (one document for each
            .txt file in it), a file of records (.jsonl, .ndjson, .json, .csv, .tsv or .parquet; one document for each
            record), or a dataset of the Hub as org/name, org/name:field or org/name:field#split.
        tokenizer: turns chat records into text with its chat template, see `moqa.data.chat`; not needed for others.

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
        raise MoqaError(spec, f"cannot be read ({error.strerror or one_line(error)})") from None
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
        MoqaError: if it holds images or demonstrations.
    """
    if isinstance(source, Images):
        raise MoqaError(f"{source.name}={source.origin} holds images", "a causal language model reads text")
    if isinstance(source, Demonstrations):
        raise MoqaError(f"{source.name}={source.origin} holds demonstrations", "a causal language model reads text")
    return source


def as_sources(data: Data, read: Callable[[str], Source]) -> list[Source]:
    """Sources from NAME=SOURCE specs or name -> source; ready ones are returned as they are.

    >>> from moqa.data import read_images
    >>> [source.name for source in as_sources({"test": "reference/image/test"}, read_images)]
    ['test']

    Args:
        data: as functions of moqa accept it.
        read: reads one spec.

    Raises:
        MoqaError: if two have the same name, or one cannot be read.
    """
    if isinstance(data, Mapping):
        specs: list[Any] = [f"{name}={value}" for name, value in data.items()]
    else:
        specs = [data] if isinstance(data, str) else list(data)
    found = [read(item) if isinstance(item, str) else item for item in specs]
    names = [source.name for source in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise MoqaError(f"two distributions are named '{twice}'", "give each its own name")
    return found


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
            return _texts(hub_records(source), hub_field(source), tokenizer)
    if not path.is_dir() and path.suffix.lower() in RECORD_SUFFIXES:
        # tools of a conversation stand beside its messages
        return _texts(file_records(path, [field or "", *_DEFAULT_FIELDS, "tools"]), field, tokenizer)
    if field:
        raise MoqaError(f"{path} has no fields", f"leave out ':{field}', or give one of {', '.join(RECORD_SUFFIXES)}")
    return map(_plain_text, _files(path) if path.is_dir() else [path])


def _files(folder: Path) -> list[Path]:
    every = sorted(file for file in folder.rglob("*") if file.is_file())
    files = [file for file in every if file.suffix == ".txt"]
    if not files and any(is_image(file) for file in every):
        raise MoqaError(f"the folder {folder} holds images", "a causal language model reads text")
    if not files:
        raise MoqaError(f"the folder {folder} holds no .txt file", "give a folder of .txt files, or one file")
    if records := [file for file in every if file.suffix.lower() in RECORD_SUFFIXES]:
        raise MoqaError(f"the folder {folder} holds texts and {records[0].name}", "give files of records by themselves")
    return files


def _plain_text(path: Path) -> str:
    """Text of a file, which is refused if it is the text of another format."""
    if path.suffix.lower() in _MARKED_UP:
        raise MoqaError(f"{path} is not plain text", "extract its text; if it is meant as it is, name it .txt")
    text = decoded(path.read_bytes(), str(path))
    first = text.lstrip()[:1_000_000].partition("\n")[0]
    if first.startswith("{") and _is_json(first):
        raise MoqaError(f"{path} holds JSON lines", "name it .jsonl")
    return text


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


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
            value = _chat(value, record.get("tools"), f"{where}, field '{key}'", tokenizer)
        elif not isinstance(value, str) or key in _CHAT_FIELDS:
            kind = type(value).__name__
            wanted = "a list of messages" if key in _CHAT_FIELDS else "a text or a list of messages"
            raise MoqaError(f"{where}, field '{key}' is of type {kind}", f"{wanted} is needed")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON escapes can stand for lone surrogates, which UTF-8 cannot hold
            raise MoqaError(f"{where}, field '{key}' is not valid Unicode", one_line(error)) from None
        yield value


def _chat(messages: list, tools: Any, where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if not messages:
        return ""
    chat = []
    for message in messages:
        if isinstance(message, Mapping) and {"from", "value"} <= message.keys():
            message = {"role": _CHAT_ROLES.get(message["from"], message["from"]), "content": message["value"]}
        if not (isinstance(message, Mapping) and "role" in message and message.keys() & {"content", "tool_calls"}):
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
        return chat_text(tokenizer, chat, tools=tools)
    except MoqaError as error:
        raise MoqaError(where, str(error)) from None
