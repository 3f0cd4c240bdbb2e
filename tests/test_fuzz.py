"""Hostile checkpoints, over a thousand: each is refused in one line, or computes exactly what the sound one does.

Every seed is one mutation, the same on every run: `python tests/test_fuzz.py show SOUND SEED` leaves its folder behind.
They run in processes of their own, so that a crash or a hang is seen and its seed known.
"""

import dataclasses
import faulthandler
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

SEEDS, BATCHES = 1200, 2
CONFIG_SEEDS = 150
SAMPLE = 50  # of from_pretrained
CASE_SECONDS, BATCH_SECONDS = 120, 1800  # what takes as long hangs, on any machine
MEMORY = 8 * 2**30  # beyond what is in use: a hostile size must not take the machine's
WEIGHTS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
MANIFEST, CONFIG, INDEX = "moqa.json", "config.json", "model.safetensors.index.json"
TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
SIDES = [CONFIG, INDEX, *TOKENIZER]


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What a mutated checkpoint may do besides being refused.

    Attributes:
        load: whether moqa may load it at all.
        differ: the loaders with which its logits may be others.
        infinite: whether its logits may be NaN or infinite.
        fail: whether its forward may raise, once it is loaded.
    """

    load: bool = True
    differ: tuple[str, ...] = ()
    infinite: bool = False
    fail: bool = False


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
        folder.mkdir()
        for path in sound.iterdir():
            os.link(path, folder / path.name)

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


MUTATIONS: list[Callable[[Victim], Allowed]] = []


def mutation(function: Callable[[Victim], Allowed]) -> Callable[[Victim], Allowed]:
    MUTATIONS.append(function)
    return function


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


# --- weight files ------------------------------------------------------------------------------------------------


@mutation
def cut_at_a_border(victim: Victim) -> Allowed:
    name = victim.random.choice(WEIGHTS)
    entries, start = victim.header(name)
    borders = [0, 8, start, *(start + offset for entry in entries.values() for offset in entry["data_offsets"])]
    raw = victim.read(name)
    cut = min(max(victim.random.choice(borders) + victim.random.choice([0, 0, -1, 1, -64]), 0), len(raw) - 1)
    victim.write(name, raw[:cut])
    victim.maybe_seal()
    return REFUSED


@mutation
def cut_or_extend_anywhere(victim: Victim) -> Allowed:
    name = victim.random.choice(WEIGHTS)
    raw = victim.read(name)
    cut = raw[: victim.random.randrange(len(raw))]
    longer = raw + victim.random.choice([b"\0", b"\0" * 64, victim.random.randbytes(1000), raw])
    middle = cut + raw[len(cut) + victim.random.choice([1, 2, 64]) :]
    victim.write(name, victim.random.choice([cut, longer, middle]))
    victim.maybe_seal()
    return REFUSED


@mutation
def flip_a_byte(victim: Victim) -> Allowed:
    name = victim.random.choice([*WEIGHTS, MANIFEST])
    raw = bytearray(victim.read(name))
    # headers are a small part of a file and where most can go wrong
    place = victim.random.randrange(min(len(raw), victim.random.choice([8, 100, 8000, len(raw)])))
    raw[place] ^= victim.random.randrange(1, 256)
    victim.write(name, bytes(raw))
    return victim.unsealed_manifest() if name == MANIFEST else victim.maybe_seal()


@mutation
def flip_a_plane_or_zero(victim: Victim) -> Allowed:
    name, begin, end = victim.some(("p0", "p1", "p2", "zero"))
    raw = bytearray(victim.read(name))
    for _ in range(victim.random.choice([1, 1, 100])):
        raw[victim.random.randrange(begin, end)] = victim.random.randrange(256)
    if victim.random.random() < 0.3:
        raw[begin:end] = victim.random.choice([b"\0", b"\xff", b"\xaa"]) * (end - begin)
    victim.write(name, bytes(raw))
    # with scales as they were, any integers are numbers
    return victim.maybe_seal(Allowed(differ=(UNVERIFIED,)), Allowed(differ=LOADERS))


@mutation
def bad_scales(victim: Victim) -> Allowed:
    name, begin, end = victim.some(("scale",))
    raw = bytearray(victim.read(name))
    place = begin + 2 * victim.random.randrange((end - begin) // 2)
    bits = victim.random.choice([0x7FC0, 0x7F80, 0xFF80, 0xBF80, 0xFFFF, 0x8001])
    raw[place : place + 2] = bits.to_bytes(2, "little")
    victim.write(name, bytes(raw))
    victim.maybe_seal()
    return REFUSED


@mutation
def other_scales(victim: Victim) -> Allowed:
    name, begin, end = victim.some(("scale",))
    raw = bytearray(victim.read(name))
    for place in range(begin, end, 2):
        bits = victim.random.choice([0x0000, 0x0001, 0x7F7F, victim.random.randrange(0x7F80)])
        raw[place : place + 2] = bits.to_bytes(2, "little")
    victim.write(name, bytes(raw))
    return victim.maybe_seal()


@mutation
def header_lengths_that_lie(victim: Victim) -> Allowed:
    name = victim.random.choice(WEIGHTS)
    raw = victim.read(name)
    length = int.from_bytes(raw[:8], "little")
    near = [length - 1, length + 1, length - 64, length + 64, len(raw), len(raw) - 8]
    lies = [0, 1, 2, 7, 8, *near, 10**8, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64 - 8]
    victim.write(name, victim.random.choice(lies).to_bytes(8, "little") + raw[8:])
    victim.maybe_seal()
    return REFUSED


@mutation
def header_entries(victim: Victim) -> Allowed:
    pick, name = victim.random.choice, victim.random.choice(WEIGHTS)
    entries, start = victim.header(name)
    raw, keys = victim.read(name), list(entries)
    one, two = pick(keys), pick(keys)
    changes = ["overlap", "swap", "drop", "add", "rename", "order", "offsets", "shape", "dtype", "value", "twice"]
    change = pick([*changes, "text"])
    text = None
    if change == "overlap":
        entries[one]["data_offsets"] = entries[two]["data_offsets"]
    elif change == "swap":
        entries[one], entries[two] = entries[two], entries[one]
    elif change == "drop":
        del entries[one]
    elif change == "add":
        entries[pick(["extra", "__metadata__", "", one + ".p0"])] = pick([entries[one], {}, NASTY[0], "x"])
    elif change == "rename":
        entries = {pick(["x", "", two + "x", "__metadata__"]) if key == one else key: e for key, e in entries.items()}
    elif change == "order":
        entries = dict(victim.random.sample(list(entries.items()), len(entries)))
    elif change == "offsets":
        begin, end = entries[one]["data_offsets"]
        entries[one]["data_offsets"] = pick(
            [[end, begin], [begin, end + 1], [begin - 1, end], [begin, 2**63], [-1, end], [begin, 10**30], [begin], [],
             None, [str(begin), end], [begin, end, 0], [0.0, end], [begin, len(raw)], [2**64, 2**64 + end - begin]]
        )  # fmt: skip
    elif change == "shape":
        shape = entries[one]["shape"]
        entries[one]["shape"] = pick(
            [[], [-s for s in shape], shape[::-1], [*shape, 1], [1, *shape], [2**62, 4], [2**32, 2**32], [10**30],
             None, "x", [0], [2 * s for s in shape], [float(s) for s in shape], [None]]
        )  # fmt: skip
    elif change == "dtype":
        entries[one]["dtype"] = pick(["F16", "BF16", "U8", "I8", "F64", "BOOL", "C64", "F4", "u8", "", None, 3, {}])
    elif change == "value":
        entries[one] = pick([None, 3, "x", [], {}, {"dtype": "U8"}, {"shape": [1], "data_offsets": [0, 1]}])
    elif change == "twice":
        text = json.dumps(entries)[:-1] + "," + json.dumps({one: entries[two]})[1:]
    else:
        text = pick([*BROKEN, *DEEP, *GIANT]).decode("latin-1")
    content = (text or json.dumps(entries)).encode("latin-1")
    if victim.random.random() < 0.7 and len(content) <= start - 8:
        content = content.ljust(start - 8)  # the data stays where it was
    victim.write(name, len(content).to_bytes(8, "little") + content + raw[start:])
    victim.maybe_seal()
    # the manifest says how every header must be, to the byte
    return REFUSED


@mutation
def swapped_files(victim: Victim) -> Allowed:
    one, two = victim.random.sample(WEIGHTS, 2)
    first, second = victim.read(one), victim.read(two)
    victim.write(one, second)
    if victim.random.random() < 0.5:
        victim.write(two, first)
    victim.maybe_seal()
    return REFUSED


@mutation
def other_kinds_of_files(victim: Victim) -> Allowed:
    name = victim.random.choice([*WEIGHTS, MANIFEST, CONFIG, INDEX])
    path, content = victim.folder / name, victim.read(name)
    kinds = ["missing", "empty", "folder", "dangling", "loop", "elsewhere", "other", "fifo", "device"]
    kind = victim.random.choice(kinds)
    victim.remove(name)
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to(name)
    elif kind == "elsewhere":
        elsewhere = victim.folder / "elsewhere"
        elsewhere.write_bytes(content)
        path.symlink_to(elsewhere)
    elif kind == "other":
        path.symlink_to(victim.sound / victim.random.choice([f for f in (*WEIGHTS, MANIFEST, CONFIG) if f != name]))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to(victim.random.choice(["/dev/zero", "/dev/null"]))
    # transformers reads no index where moqa loads
    return HARMLESS if kind == "elsewhere" or name == INDEX else REFUSED


# --- the manifest ------------------------------------------------------------------------------------------------


def _paths(data: object, path: tuple = ()) -> Iterable[tuple]:
    """Every place in nested JSON."""
    if path:
        yield path
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _paths(value, (*path, key))


def _somewhere(victim: Victim, data: dict) -> tuple[dict | list, str | int]:
    """The parent and key of a random place, as often near the root as deep in it."""
    paths = list(_paths(data))
    depth = victim.random.choice(sorted({len(path) for path in paths}))
    *parents, last = victim.random.choice([path for path in paths if len(path) == depth])
    for key in parents:
        data = data[key]
    return data, last


@mutation
def manifest_fields(victim: Victim) -> Allowed:
    data = victim.json(MANIFEST)
    for _ in range(victim.random.choice([1, 1, 1, 3])):
        parent, key = _somewhere(victim, data)
        parent[key] = victim.random.choice(NASTY)
    if victim.random.random() < 0.2:
        victim.write_json(MANIFEST, data)
        return victim.unsealed_manifest()
    victim.write_manifest(data)
    return SEALED


@mutation
def plausible_manifest_fields(victim: Victim) -> Allowed:
    data = victim.json(MANIFEST)
    while True:
        parent, key = _somewhere(victim, data)
        value = parent[key]
        if isinstance(value, bool):
            parent[key] = not value
        elif isinstance(value, int):
            parent[key] = victim.random.choice([value + 1, value + 32, 2 * value + 1])
        elif isinstance(value, float):
            parent[key] = value / 2 + 0.25
        elif isinstance(value, str):
            parent[key] = value[:-1] + chr(ord(value[-1:] or "a") ^ 1)
        else:
            continue
        break
    victim.write_json(MANIFEST, data)
    return victim.unsealed_manifest()


@mutation
def manifest_structure(victim: Victim) -> Allowed:
    data, pick = victim.json(MANIFEST), victim.random.choice
    for _ in range(victim.random.choice([1, 1, 2])):
        parent, key = _somewhere(victim, data)
        other, place = _somewhere(victim, data)
        change = pick(["drop", "rename", "copy", "swap"])
        if change == "drop" and isinstance(parent, dict):
            del parent[key]
        elif change == "rename" and isinstance(parent, dict):
            parent[pick(["", "\n", "a\nb: c", "\0", "../x", "x" * 5000, f"{key}x", "__class__"])] = parent.pop(key)
        elif change == "copy":
            parent[key] = json.loads(json.dumps(other[place]))
        else:
            parent[key], other[place] = json.loads(json.dumps([other[place], parent[key]]))
    victim.write_manifest(data)
    return SEALED


UNIT_FIELDS = {
    "width": [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 16, 17, 2**31, 10**30, 3.0, "3", None, True],
    "group_size": [-64, 0, 1, 8, 31, 32, 33, 64, 96, 128, 4096, 2**31, 2**62, 10**30, 64.0, "64", None],
    "symmetric": [True, False, 1, "yes", None],
    "scale_dtype": ["float16", "bfloat16", "float32", "float8_e4m3fn", "", None, 5],
    "layer": [-1, 0, 1, 2, 3, 10**30, None, 0.5],
    "shape": [[-24, -40], [0, 40], [1, 1], [2**40] * 2, [10**30, 1], [24], [24, 40, 1], None, "xx", [1.5, 2], [72, 40]],
    "method": ["", 3, None], "role": ["expert", "\n", None], "error": [-1, float("nan"), "x"],
}  # fmt: skip


@mutation
def unit_fields(victim: Victim) -> Allowed:
    data = victim.json(MANIFEST)
    unit = data["units"][victim.random.choice(sorted(data["units"]))]
    field = victim.random.choice(sorted(UNIT_FIELDS))
    (unit["scheme"] if field in unit["scheme"] else unit)[field] = victim.random.choice(UNIT_FIELDS[field])
    victim.write_manifest(data)
    return SEALED


@mutation
def manifest_text(victim: Victim) -> Allowed:
    raw, pick = victim.read(MANIFEST), victim.random.choice
    evil = victim.json(MANIFEST)
    units = evil["units"]
    names = sorted(units)
    units[names[0]], units[names[1]] = units[names[1]], units[names[0]]
    key = pick(["units", "layers", "format", "checksum", "files", "kept"])
    wrong = json.dumps({key: pick([evil["units"], 5, "", None, {}])})[1:-1].encode()
    victim.write(
        MANIFEST,
        pick(
            [
                *BROKEN, *DEEP, *GIANT, raw + b"x", raw + raw, b"[" + raw + b"]", b"\xef\xbb\xbf" + raw,
                raw[: victim.random.randrange(len(raw))], raw.decode().encode("utf-16"),
                # one key twice: readers disagree on which counts
                b"{" + wrong + b"," + raw.strip()[1:], raw.strip()[:-1] + b"," + wrong + b"}",
                raw.replace(b"{", b'{"later": ' + pick(DEEP + GIANT) + b",", 1),
            ]
        ),
    )  # fmt: skip
    return victim.unsealed_manifest()


@mutation
def newer_formats(victim: Victim) -> Allowed:
    data = victim.json(MANIFEST)
    data["format"] = victim.random.choice([2, 3, 10**30, "2", None, [], 1.5, float("inf")])
    if victim.random.random() < 0.3:
        data["later"] = victim.random.choice(NASTY)
    victim.write_manifest(data)
    return REFUSED


# --- an attacker who lays the files out again --------------------------------------------------------------------


def _rebuild(victim: Victim, data: dict) -> None:
    """Files that are all that a manifest says, with the tensors that are still as long as they were."""
    import torch

    from moqa.format.layout import entry_bytes, shards
    from moqa.format.scheme import Scheme

    old = {}
    for name in WEIGHTS:
        entries, start = victim.header(name)
        raw = victim.read(name)
        old |= {key: raw[start + e["data_offsets"][0] : start + e["data_offsets"][1]] for key, e in entries.items()}
    kept = {name: (getattr(torch, t["dtype"]), tuple(t["shape"])) for name, t in data["kept"].items()}
    # not validated: an attacker's tools are not
    schemes = {name: Scheme.model_construct(**unit["scheme"]) for name, unit in data["units"].items()}
    units = {name: (u["layer"], tuple(u["shape"]), schemes[name]) for name, u in data["units"].items()}
    data["files"] = {}
    for shard in shards(kept, data["layers"], units):
        content = shard.header()
        for name, entry in shard.entries.items():
            length, found = entry_bytes(entry), old.get(name, b"")
            if len(found) != length:
                found = victim.random.randbytes(length)
                if entry[0].is_floating_point:  # small numbers, of either sign only where that is no scale
                    half = bytes([0x3C]) if name.endswith("scale") else victim.random.choice([b"\x3c", b"\xbc"])
                    found = (b"\0" * (entry[0].itemsize - 1) + half) * (length // entry[0].itemsize)
            content += found
        path = victim.folder / shard.file
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        data["files"][shard.file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    victim.write_manifest(data)


@mutation
def rebuilt_units(victim: Victim) -> Allowed:
    data, pick = victim.json(MANIFEST), victim.random.choice
    fits = True
    for _ in range(pick([1, 1, 5])):
        name = pick(sorted(data["units"]))
        unit = data["units"][name]
        width = pick([1, 2, 3, 4, 5, 6, 7, 8, 16])
        unit["scheme"] = {
            "width": width, "group_size": pick([32, 64, 96, 4096, 2**20, 2**31, 2**40]),
            "symmetric": width > 1 and pick([True, False]), "scale_dtype": pick(["bfloat16", "float16"]),
        }  # fmt: skip
        change = pick(["scheme", "scheme", "scheme", "shape", "layer", "drop", "add", "rename", "layers"])
        fits &= change in ("scheme", "layers")  # one more layer's file may be empty
        out, features = unit["shape"]
        if change == "shape":
            unit["shape"] = pick([[out + 1, features], [out, features + 32], [features, out + 5], [1, 1]])
        elif change == "layer":
            unit["layer"] = 1 - unit["layer"]
        elif change == "drop":
            del data["units"][name]
        elif change == "add":
            data["units"][pick([f"{name}x", "model.layers.9.mlp.gate", "lm_head", "a\nb", "model.norm"])] = dict(unit)
        elif change == "rename":
            data["units"][pick([f"{name}.weight", "x", "model.embed_tokens", "..", "a\nb"])] = data["units"].pop(name)
        elif change == "layers":
            data["layers"] = pick([3, 5])
    try:
        _rebuild(victim, data)
    except KeyError:  # two changes that make no sense together
        return HARMLESS
    return SEALED if fits else Allowed(load=False, differ=(TRANSFORMERS,))


@mutation
def rebuilt_kept_tensors(victim: Victim) -> Allowed:
    data, pick = victim.json(MANIFEST), victim.random.choice
    name = pick(sorted(data["kept"]))
    tensor = data["kept"][name]
    change = pick(["dtype", "shape", "drop", "add", "rename", "values"])
    allowed = Allowed(load=False, differ=(TRANSFORMERS,))
    if change == "dtype":
        tensor["dtype"] = pick(["float32", "float64", "float16", "int64", "int32", "uint8", "bool"])
        allowed = SEALED
    elif change == "shape":
        shape = tensor["shape"]
        tensor["shape"] = pick([[], [0], [*shape, 1], [1, *shape], shape[::-1] if len(shape) > 1 else [*shape, 2], [7]])
    elif change == "drop":
        del data["kept"][name]
    elif change == "add":
        new = pick(["x", "model.layers.0.mlp.experts.gate_up_proj", "lm_head.bias", "a\nb", "", "model.norm.bias"])
        data["kept"][new] = tensor
    elif change == "rename":
        data["kept"][pick(["x", name + ".weight", "a\nb"])] = data["kept"].pop(name)
    else:
        entries, start = victim.header(WEIGHTS[0])
        raw = bytearray(victim.read(WEIGHTS[0]))
        begin, end = (start + offset for offset in entries[name]["data_offsets"])
        raw[begin:end] = victim.random.choice([b"\0\0", b"\xc0\x7f", b"\x80\x7f", b"\x7f\x7f"]) * ((end - begin) // 2)
        victim.write(WEIGHTS[0], bytes(raw))
        victim.seal()
        return SEALED
    _rebuild(victim, data)
    return allowed


# --- files beside the weights ------------------------------------------------------------------------------------


@mutation
def index_and_quantization_config(victim: Victim) -> Allowed:
    pick = victim.random.choice
    if victim.random.random() < 0.5:
        index = victim.json(INDEX)
        weights = index["weight_map"]
        name = pick(sorted(weights))
        for _ in range(pick([1, 3])):
            change = pick(["file", "drop", "add", "field", "raw"])
            if change == "file":
                weights[name] = pick([*WEIGHTS, "../x", "/etc/passwd", "", "nowhere.safetensors", "a\nb", "x" * 5000])
            elif change == "drop":
                weights.pop(name, None)
            elif change == "add":
                weights[pick(["model.layers.0.self_attn.q_proj.weight", "lm_head.weight", "x"])] = pick(WEIGHTS)
            elif change == "field":
                parent, key = _somewhere(victim, index)
                parent[key] = pick(NASTY)
            weights = index.get("weight_map")
            if not isinstance(weights, dict):
                break
        victim.write(INDEX, pick([json.dumps(index).encode()] * 3 + [pick(BROKEN + DEEP + GIANT)]))
        return HARMLESS
    config = victim.json(CONFIG)
    config["quantization_config"] = pick(
        [{"quant_method": "moqa", "verify": False}, {"quant_method": "moqa", "kernels": "reference", "x": 1},
         {"quant_method": "moqa", "kernels": "none"}, {"quant_method": "moqa", "verify": "no"},
         {"quant_method": "gptq"}, {"quant_method": "bitsandbytes"}, {"quant_method": None},
         {"quant_method": ["moqa"]}, {"quant_method": "moqa", "modules_to_not_convert": ["lm_head"]}, [], "moqa", 5]
    )  # fmt: skip
    victim.write_json(CONFIG, config)
    # the reference rounds no activations; and where nothing names moqa, transformers does not ask it
    return Allowed(differ=(TRANSFORMERS,))


@mutation
def tokenizer_files(victim: Victim) -> Allowed:
    name, pick = victim.random.choice(TOKENIZER), victim.random.choice
    raw = bytearray(victim.read(name))
    change = pick(["flip", "cut", "text", "field"])
    if change == "flip":
        for _ in range(pick([1, 20])):
            raw[victim.random.randrange(len(raw))] = victim.random.randrange(256)
    elif change == "cut":
        del raw[victim.random.randrange(len(raw)) :]
    elif change == "text":
        raw = bytearray(pick(BROKEN + DEEP + GIANT))
    else:
        data = victim.json(name)
        if name == "tokenizer.json":
            data["model"] = pick([data["model"], {}, None, {"type": "BPE"}, {"type": "x"}])
            data[pick(sorted(data))] = pick(NASTY)
        else:
            parent, key = _somewhere(victim, data)
            parent[key] = pick(NASTY)
        raw = bytearray(json.dumps(data).encode())
    victim.write(name, bytes(raw))
    return HARMLESS


@mutation
def json_at_its_worst(victim: Victim) -> Allowed:
    victim.write(CONFIG, victim.random.choice(BROKEN + DEEP + GIANT))
    return REFUSED


def config_edits(victim: Victim) -> Allowed:
    """Another architecture than the weights were quantized for."""
    config, pick = victim.json(CONFIG), victim.random.choice
    change = pick(["size", "size", "size", "type", "drop", "field", "field", "meaning"])
    sizes = [key for key, value in config.items() if isinstance(value, int) and not isinstance(value, bool)]
    if change == "size":
        key = pick(sorted(sizes))
        size = config[key]
        config[key] = pick([size + 1, 2 * size, size // 2, 0, -1, 10**5, 2**31, 10**30, None, "8", 1.5, [8]])
    elif change == "type":
        others = ["llama", "mixtral", "qwen2_moe", "gpt2", "bert", "gpt_oss", "", None, 5, "nope", "a\nb"]
        config["model_type"] = pick(others)
    elif change == "drop":
        config.pop(pick(sorted(config)))
    elif change == "field":
        config[pick(sorted(config))] = pick(NASTY)
    else:
        key, value = pick(
            [("rms_norm_eps", 1e-3), ("hidden_act", "gelu"), ("num_experts_per_tok", 3), ("norm_topk_prob", False),
             ("rope_parameters", {"rope_type": "default", "rope_theta": 100.0}), ("tie_word_embeddings", False),
             ("sliding_window", 2), ("attention_bias", True), ("mlp_only_layers", [0]), ("decoder_sparse_step", 2),
             ("layer_types", ["sliding_attention"] * 2), ("use_sliding_window", True)]
        )  # fmt: skip
        config[key] = value
    victim.write_json(CONFIG, config)
    if victim.random.random() < 0.5:
        return HARMLESS
    digest = hashlib.sha256(victim.read(CONFIG)).hexdigest()
    victim.write_manifest(victim.json(MANIFEST) | {"config": digest})
    return dataclasses.replace(SEALED, fail=True)


# --- running them ------------------------------------------------------------------------------------------------


def mutate(sound: Path, folder: Path, seed: str) -> tuple[str, Allowed]:
    """Make the checkpoint of a seed; its name says what was done."""
    kind, number = seed.split(":")
    function = config_edits if kind == "config" else MUTATIONS[int(number) % len(MUTATIONS)]
    return function.__name__, function(Victim(sound, folder, seed))


def logits_of(model):
    import torch

    with torch.no_grad():
        return model(torch.arange(12)[None] * 531 % 8192).logits


def loaders() -> dict[str, Callable]:
    """By name: gives the model of a folder."""
    from transformers import AutoModelForCausalLM

    import moqa

    return {
        VERIFIED: lambda folder: moqa.load(folder)[0],
        UNVERIFIED: lambda folder: moqa.load(folder, verify=False)[0],
        TRANSFORMERS: AutoModelForCausalLM.from_pretrained,
    }


def problem(name: str, load: Callable, folder: Path, allowed: Allowed, sound) -> tuple[str, str | None]:
    """What came of loading a mutated checkpoint, and what is wrong with that."""
    import torch

    from moqa import MoqaError

    model = None
    try:
        model = load(folder)
        found = logits_of(model)
    except MoqaError as error:
        one_line = "\n" not in str(error) and len(str(error)) < 2000
        return "refused", None if one_line else f"a message of many lines: {error!r:.300}"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        if name == TRANSFORMERS or (allowed.fail and model is not None):
            return "refused", None
        frames = traceback.extract_tb(error.__traceback__)
        at = next((frame for frame in reversed(frames) if "/moqa/" in frame.filename), frames[-1])
        text = " ".join(str(error).split())
        return "error", f"{type(error).__name__}: {text:.160} ({Path(at.filename).name}:{at.lineno} {at.line})"
    if not allowed.load and name != TRANSFORMERS:
        return "loaded", "it loaded"
    if not allowed.infinite and not bool(torch.isfinite(found).all()):
        return "loaded", "its logits are not finite"
    if name not in allowed.differ and not torch.equal(found, sound):
        return "loaded", "its logits differ"
    return "loaded", None


def run(sound: Path, names: list[str], seeds: list[str]) -> None:
    """Print a line per seed before it is tried, and one for each thing that is wrong; what happened at the end."""
    import torch
    from transformers.utils import logging

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    known, seen = loaders(), Counter()
    wanted = {name: logits_of(known[name](sound)) for name in names}
    with tempfile.TemporaryDirectory(dir=sound.parent) as parent:
        for seed in seeds:
            print(f"seed {seed}", flush=True)
            faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
            folder = Path(parent) / "case"
            kind, allowed = mutate(sound, folder, seed)
            for name in names:
                torch.manual_seed(zlib.crc32(seed.encode()))  # what is left at random must not be right by chance
                outcome, wrong = problem(name, known[name], folder, allowed, wanted[name])
                seen[f"{name} {outcome}"] += 1
                if wrong is not None:
                    print(f"WRONG {kind}, {name}: {wrong}", flush=True)
            shutil.rmtree(folder)
            faulthandler.cancel_dump_traceback_later()
    print(f"seen {json.dumps(seen)}")


def show(sound: Path, seed: str) -> None:
    """Leave the checkpoint of a seed in a new folder, for a closer look."""
    folder = Path(tempfile.mkdtemp(dir=sound.parent)) / "case"
    print(*mutate(sound, folder, seed), folder)


# --- what pytest sees --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tiny_model, texts, tmp_path_factory) -> Path:
    """The tiny model quantized with every width somewhere."""
    from moqa.planning import Budget, plan
    from moqa.profiling import profile
    from moqa.quantization import quantize

    folder = tmp_path_factory.mktemp("fuzz")
    profiled = profile(tiny_model, [texts["wiki"]], folder / "profile", samples=2, context=16, self_samples=0)
    widths = (1, 2, 3, 4, 5, 6, 7, 8, 16)
    planned = plan(profiled, Budget.parse(bpw=9), strategy="random", widths=widths, seed=1)
    assert {scheme.width for scheme in planned.units.values()} == set(widths)
    return quantize(tiny_model, planned, folder / "sound", method="rtn", profile=profiled)


def check(sound: Path, names: list[str], seeds: list[str]) -> Counter:
    """Run seeds in a process of their own; what came of them, by loader."""
    command = [sys.executable, __file__, "run", str(sound), ",".join(names), *seeds]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            code = subprocess.run(command, stdout=out, stderr=err, env=environment, timeout=BATCH_SECONDS).returncode
        except subprocess.TimeoutExpired:
            code = f"no end after {BATCH_SECONDS} s"
        lines, errors = (file.seek(0) or file.read().splitlines() for file in (out, err))
    seed, wrong = "start", []
    for line in lines:
        if line.startswith("seed "):
            seed = line
        elif line.startswith("WRONG "):
            wrong.append(f"{seed}: {line.removeprefix('WRONG ')}")
    if code != 0:
        wrong.append(f"{seed} was the last of the process (exit {code}), which said\n" + "\n".join(errors[-40:]))
    if wrong:
        pytest.fail(f"{len(wrong)} are wrong:\n" + "\n".join(wrong), pytrace=False)
    return Counter(json.loads(lines[-1].removeprefix("seen ")))


@pytest.mark.parametrize("batch", [0, *(pytest.param(batch, marks=pytest.mark.slow) for batch in range(1, BATCHES))])
def test_hostile_checkpoints_are_refused_or_harmless(sound, batch):
    seeds = [f"any:{number}" for number in range(SEEDS) if number % BATCHES == batch]
    seen = check(sound, [VERIFIED, UNVERIFIED], seeds)
    # most must be refused, and some must not: a reader that refuses all would pass otherwise
    assert seen["verified refused"] > 0.6 * len(seeds)
    assert seen["unverified loaded"] > seen["verified loaded"] > 0.05 * len(seeds)


def test_a_configuration_that_is_not_the_weights(sound):
    seen = check(sound, [VERIFIED, UNVERIFIED], [f"config:{number}" for number in range(CONFIG_SEEDS)])
    assert seen["verified refused"] > 0.3 * CONFIG_SEEDS


def test_transformers_own_loader_gives_no_wrong_logits(sound):
    seeds = [f"any:{number}" for number in range(SEEDS, SEEDS + SAMPLE)]
    seen = check(sound, [TRANSFORMERS], seeds)
    assert seen["transformers refused"] > 0.5 * len(seeds)


if __name__ == "__main__":
    _, command, sound_folder, *rest = sys.argv
    if command == "show":
        show(Path(sound_folder), rest[0])
    else:
        run(Path(sound_folder), rest[0].split(","), rest[1:])
