"""Artifacts as JSON: validated when read, written the same way every time."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from moqa.errors import MoqaError
from moqa.storage.files import read_object, read_text
from moqa.storage.folders import sync

Record = TypeVar("Record", bound=BaseModel)


def write_json(record: BaseModel | dict, path: Path) -> None:
    """Write a record with sorted keys, so that artifacts diff well and equal records give equal files.

    >>> write_json(plan, Path("plan.json"))
    """
    data = record.model_dump(mode="json") if isinstance(record, BaseModel) else record
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a kill or a loss of power leaves the earlier file or the new one, never a part.

    >>> write_whole(Path("note.txt"), "done")
    >>> Path("note.txt").read_text()
    'done'
    """
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():  # a pipe or a device is written to, not replaced
        path.write_bytes(data)
        return
    path = path.resolve()  # a link stays a link
    # one name for all tries: what a killed one left is overwritten by the next
    fresh = path.with_name(f".{path.name}.new")
    try:
        with fresh.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    sync(path.parent)


def read_json(kind: type[Record], path: Path, made_by: str = "") -> Record:
    """Read and validate a record.

    >>> write_json(plan, Path("plan.json"))
    >>> read_json(type(plan), Path("plan.json")) == plan
    True

    Args:
        kind: of record.
        path: of the file.
        made_by: the command that makes such files, for messages.

    Raises:
        MoqaError: if the file is missing, not JSON, or not such a record; names the first wrong field.
    """
    name, remedy = kind.__name__.removesuffix("Record").lower(), f"; {made_by} makes one" if made_by else ""
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise MoqaError(f"no {name} at {path}", f"{reason}{remedy}") from None
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        raise MoqaError(f"{path} is not a {name}", f"{reason}{remedy}") from None


def check_format(what: str, found: int, known: int) -> None:
    """Refuse an artifact that a newer moqa wrote.

    >>> check_format("plan.json has plan", found=1, known=1)

    Raises:
        MoqaError: if its format number is above the one that is known.
    """
    if found > known:
        raise MoqaError(f"{what} format {found}", f"this moqa reads up to {known}: upgrade moqa")


def signed(record: Record) -> Record:
    """A record with its `checksum` filled in."""
    return record.model_copy(update={"checksum": checksum(record.model_dump(mode="json"))})


def check_signed(path: Path, recorded: str) -> None:
    """Check that the JSON of a `signed` record, with any fields that a later version adds, is as it was written.

    Raises:
        MoqaError: if it was changed.
    """
    try:
        found = checksum(json.loads(read_text(path)))
    except (ValueError, RecursionError):
        found = ""
    if not found or found != recorded:
        raise MoqaError(f"{path} was changed after it was written", "its checksum differs")


def write_sealed(record: BaseModel, path: Path, **more: Any) -> None:
    """Write a record, and more that describes its files, with a checksum by which `check_seal` detects changes.

    >>> write_sealed(plan, Path("plan.json"))
    """
    data = record.model_dump(mode="json") | more
    write_json(data | {"checksum": checksum(data)}, path)


def check_seal(path: Path) -> dict[str, Any]:
    """The JSON of a record that `write_sealed` wrote; what an earlier moqa wrote has no checksum.

    >>> check_seal(Path("plan.json"))["strategy"]
    'budget'

    Raises:
        MoqaError: if the file was changed after it was written.
    """
    data = read_object(path)
    if "checksum" in data and data["checksum"] != checksum(data):
        raise MoqaError(f"{path} was changed after it was written", "its checksum differs: make it again")
    return data


def file_hash(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(data: dict) -> str:
    """Hash of a record's JSON, independent of its layout; the key `checksum` is left out.

    >>> checksum({"a": 1, "checksum": "0"}) == checksum({"a": 1})
    True
    """
    counted = {key: value for key, value in data.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()
