"""A sound checkpoint that is about to be changed, what a change allows, and values that are nasty anywhere."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

WEIGHTS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
MANIFEST, CONFIG, INDEX = "moqa.json", "config.json", "model.safetensors.index.json"
TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What a mutated checkpoint may do besides being refused.

    Attributes:
        load: whether moqa may load it at all.
        differ: the loaders with which its logits may be others.
        infinite: whether its logits may be NaN or infinite.
        fail: the loaders with which its forward may raise, once it is loaded.
    """

    load: bool = True
    differ: tuple[str, ...] = ()
    infinite: bool = False
    fail: tuple[str, ...] = ()


VERIFIED, UNVERIFIED, TRANSFORMERS = LOADERS = ("verified", "unverified", "transformers")
REFUSED = Allowed(load=False)
HARMLESS = Allowed()
# whoever makes all checksums again decides what the weights are; a reader without `verify` does not look at hashes
SEALED = Allowed(differ=LOADERS, infinite=True)
UNSEALED = Allowed(differ=(UNVERIFIED,), infinite=True)


class Victim:
    """A copy of the sound checkpoint: hard links, replaced where they are changed."""

    def __init__(self, sound: Path, folder: Path, seed: int | str) -> None:
        self.folder, self.sound = folder, sound
        self.random = random.Random(seed)
        shutil.copytree(sound, folder, copy_function=os.link)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        self.remove(name)
        (self.folder / name).write_bytes(content)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()

    def json(self, name: str) -> dict:
        return json.loads(self.read(name))

    def write_json(self, name: str, data: object) -> None:
        self.write(name, json.dumps(data).encode())

    def header(self, name: str) -> tuple[dict, int]:
        """Entries of a weight file, and where its data begins."""
        raw = self.read(name)
        length = int.from_bytes(raw[:8], "little")
        return json.loads(raw[8 : 8 + length]), 8 + length

    def write_manifest(self, data: dict) -> None:
        """With its checksum made again."""
        from moqa.storage.artifact import checksum

        self.write_json(MANIFEST, data | {"checksum": checksum(data)})

    def seal(self) -> None:
        """Record the hashes and lengths that the weight files have now."""
        data = self.json(MANIFEST)
        for name in WEIGHTS:
            content = self.read(name)
            data["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        self.write_manifest(data)

    def maybe_seal(self, unsealed: Allowed = UNSEALED, sealed: Allowed = SEALED) -> Allowed:
        if self.random.random() < 0.5:
            return unsealed
        self.seal()
        return sealed

    def unsealed_manifest(self) -> Allowed:
        """What an edited manifest with its old checksum may do: nothing, unless it still says the same."""
        try:
            same = self.json(MANIFEST) == json.loads((self.sound / MANIFEST).read_bytes())
        except (ValueError, RecursionError):
            same = False
        return HARMLESS if same else REFUSED

    def some(self, suffixes: Iterable[str]) -> tuple[str, int, int]:
        """A tensor of a unit with one of these suffixes: its file and where its bytes are."""
        found = []
        for name in WEIGHTS[1:]:
            entries, start = self.header(name)
            for key, entry in entries.items():
                if key.rpartition(".")[2] in suffixes:
                    found.append((name, *(start + offset for offset in entry["data_offsets"])))
        return self.random.choice(found)


def _paths(data: object, path: tuple = ()) -> Iterable[tuple]:
    """Every place in nested JSON."""
    if path:
        yield path
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _paths(value, (*path, key))


def somewhere(victim: Victim, data: dict) -> tuple[dict | list, str | int]:
    """The parent and key of a random place, as often near the root as deep in it."""
    paths = list(_paths(data))
    depth = victim.random.choice(sorted({len(path) for path in paths}))
    *parents, last = victim.random.choice([path for path in paths if len(path) == depth])
    for key in parents:
        data = data[key]
    return data, last


NASTY = [
    None, True, False, 0, 1, -1, 2, 3, 9, 15, 16, 17, 64, 127, 255, 256, 2**31, 2**32, 2**40, 2**63, 2**64, 10**30,
    -(2**63), 10**400, 0.5, 1.0, -0.0, 1e308, float("nan"), float("inf"), "", "0", "1", "None", "\n", "a\nb", "\0",
    "../../etc/passwd", "/etc/passwd", "é\u202e", "x" * 10_000, [], [0], [1, 1], [-24, -40], [2**40, 2**40],
    [10**30, 10**30], [[]], {}, {"": {}}, {"a": [None]}, "bfloat16", "float64", "complex64", "bool", "__class__",
]  # fmt: skip
DEEP = [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 20_000 + b"1" + b"}" * 20_000]
GIANT = [
    b"1" * 100_000, b'{"x": ' + b"9" * 100_000 + b"}", b'"' + b"x" * 10**6 + b'"', b'{"a":1e999999}',
    b"{" + b",".join(b'"%d":0' % i for i in range(50_000)) + b"}",
]  # fmt: skip
BROKEN = [
    b"", b" ", b"\0", b"\0" * 4096, b"{", b"}", b"null", b"[]", b"{}", b"1", b'""', b"NaN", b"\xff\xfe{\0}\0",
    b"\xef\xbb\xbf{}", b"\xff" * 100, b"{'a': 1}", b'{"a": 1,}', b'{"\\ud800": 1}', b"<html>", b"// {}",
]  # fmt: skip
