"""The fingerprint of an original: all that results depend on, in parts, so that what differs has a name."""

import hashlib
import json
import os
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from moqa.errors import MoqaError, UnreadableError
from moqa.originals.folder import DTYPES, headers, weight_files

# the first bytes of every tensor, which most other models differ in
_SAMPLED_BYTES = 4096
# bytes that a thread hashes at a time, and threads: a disk is not faster
_PIECE, _THREADS = 4 * 2**20, 4
_HEX = 32  # digits of each part
# values of JSON files that no result depends on; texts that a template rendered have a hash of their own
_UNUSED = {"transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "chat_template"}
# files that turn texts or images into what a model reads
_READERS = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "tekken.json", "vocab*.*", "merges.txt",
    "*.model", "*processor_config.json",
)  # fmt: skip
# seconds in which a file may change without its time changing
_RECENT = 2


def fingerprint(folder: Path) -> str:
    """Identifies an original by its tensors, configuration, tokenizer files, and every byte of its weights.

    >>> [len(part) for part in fingerprint(Path("reference/model")).split("-")]
    [32, 32, 32, 32]

    Raises:
        MoqaError: if a file is missing or corrupted, or a tensor's name occurs twice.
    """
    return "-".join(hash_of(folder)[:_HEX] for hash_of in _PARTS.values())


def differing_part(folder: Path, recorded: str, times: tuple[tuple[int, int], ...] = ()) -> str | None:
    """What of an original differs from the one with a recorded fingerprint, found at the least cost; None if nothing.

    >>> differing_part(Path("reference/model"), "0" * 32)
    'tensors'

    A fingerprint of moqa 0.1 is checked as that version did: by the tensors' names, dtypes, shapes and first bytes.

    Args:
        folder: of the original.
        recorded: its fingerprint at another time or on another machine.
        times: `file_times` of the recorded original, if they are known: weights with the same are not read again.

    Raises:
        MoqaError: as for `fingerprint`.
    """
    if "-" not in recorded:
        return None if recorded == _tensors(folder) else "tensors"
    known = recorded.split("-", len(_PARTS) - 1)
    for (name, hash_of), part in zip(_PARTS.items(), [*known, *[""] * len(_PARTS)], strict=False):
        unchanged = name == "weights" and file_times(folder) == times
        if not unchanged and hash_of(folder)[:_HEX] != part:
            return name
    return None


def file_times(folder: Path) -> tuple[tuple[int, int], ...]:
    """Length and time of change of every weight file.

    >>> len(file_times(Path("reference/model")))
    1
    """
    return tuple((found.st_size, found.st_mtime_ns) for found in map(Path.stat, weight_files(folder)))


def _tensors(folder: Path) -> str:
    """Hash of every tensor's name, dtype, shape and first bytes."""
    digest, found = hashlib.sha256(), headers(folder)
    for path in weight_files(folder):
        try:
            with path.open("rb", buffering=0) as file:
                data = 8 + struct.unpack("<Q", file.read(8))[0]
                for name in sorted(name for name, entry in found.items() if entry["file"] == path.name):
                    entry = found[name]
                    begin, end = entry["data_offsets"]
                    file.seek(data + begin)
                    digest.update(f"{name} {DTYPES[entry['dtype']]} {tuple(entry['shape'])}\n".encode())
                    digest.update(file.read(min(end - begin, _SAMPLED_BYTES)))
        except OSError as error:
            raise UnreadableError(f"{path} cannot be read", str(error)) from None
    return digest.hexdigest()


def _configuration(folder: Path) -> str:
    return hashlib.sha256(_values(folder / "config.json")).hexdigest()


def _tokenizer(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _READERS for path in folder.glob(pattern)}):
        content = _values(path) if path.name == "tokenizer_config.json" else path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _weights(folder: Path) -> str:
    """Hash of all weight files, remembered while they stay as they are."""
    paths = weight_files(folder)
    try:
        found = [path.stat() for path in paths]
        files = tuple(
            (str(path.absolute()), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino)
            for path, s in zip(paths, found, strict=True)
        )
        recent = max(s.st_ctime for s in found) > time.time() - _RECENT
        return _hash_files.__wrapped__(files) if recent else _hash_files(files)
    except OSError as error:
        raise UnreadableError(f"{folder} cannot be read", str(error)) from None


@lru_cache(maxsize=8)
def _hash_files(files: tuple[tuple[str, int, int, int, int], ...]) -> str:
    """Hash of files, by hashes of their pieces: hashing and reading release Python's lock."""
    pieces = [(path, begin) for path, size, *_ in files for begin in range(0, size, _PIECE)]
    digest = hashlib.sha256("".join(f"{size}\n" for _, size, *_ in files).encode())
    with ThreadPoolExecutor(_THREADS, "moqa-hash") as pool:
        for hashed in pool.map(_hash_piece, pieces):
            digest.update(hashed)
    return digest.hexdigest()


def _hash_piece(place: tuple[str, int]) -> bytes:
    path, begin = place
    with Path(path).open("rb", buffering=0) as file:
        return hashlib.sha256(os.pread(file.fileno(), _PIECE, begin)).digest()


def _values(path: Path) -> bytes:
    """The values of a JSON file, however it is written."""
    try:
        return json.dumps(_normal(json.loads(path.read_bytes())), sort_keys=True).encode()
    except (ValueError, RecursionError, OSError) as error:
        raise MoqaError(f"{path.parent} has a {path.name} that cannot be read", str(error)) from None


def _normal(value: Any) -> Any:
    if isinstance(value, dict):
        named = {"dtype" if name == "torch_dtype" else name: item for name, item in value.items()}
        return {name: _normal(item) for name, item in named.items() if name not in _UNUSED}
    if isinstance(value, list):
        return [_normal(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


# from the cheapest to the dearest
_PARTS: dict[str, Callable[[Path], str]] = {
    "tensors": _tensors, "configuration values": _configuration, "tokenizer files": _tokenizer, "weights": _weights,
}  # fmt: skip
