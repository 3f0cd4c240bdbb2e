"""Changes that can happen to any artifact: each is one mutation of one file, or of two."""

import contextlib
import json
import os
import socket
from collections.abc import Callable

from hostile.victim import BROKEN, DEEP, GIANT, MANIFEST, NASTY, Victim, somewhere

# what a terminal would obey, and what a reader could take for other words
ESCAPES = [
    "\x1b[2J\x1b[1;31m",
    "\x1b]0;title\x07",
    "\x9b31m",
    "a\rb",
    "\u202eevil",
    "\x00",
    "\u2028",
    "../../x",
    "x" * 9000,
]
SIZES = [0, -1, 1, 3, 7, 1000, 2**31, 10**9, 2**63, 10**30, 10**400, 0.5, -0.25, 1e308, float("nan"), float("inf")]


def _file(victim: Victim, *ends: str) -> str:
    names = sorted(path.relative_to(victim.folder).as_posix() for path in victim.folder.rglob("*") if path.is_file())
    return victim.random.choice([name for name in names if name.endswith(ends)] or names)


def flipped_bits(victim: Victim) -> None:
    name = _file(victim, "")
    raw = bytearray(victim.read(name))
    # headers are a small part of a file and where most can go wrong
    end = min(len(raw), victim.random.choice([8, 200, 8000, len(raw), len(raw)]))
    for _ in range(victim.random.choice([1, 1, 1, 8])):
        raw[victim.random.randrange(end)] ^= 1 << victim.random.randrange(8)
    victim.write(name, bytes(raw))


def cut_or_longer(victim: Victim) -> None:
    name = _file(victim, "")
    raw = victim.read(name)
    at = victim.random.randrange(len(raw))
    tails = [b"", b"", b"", raw[at + 1 :], raw[at + 64 :], raw[at:] + b"\0", raw[at:] + raw]
    victim.write(name, raw[:at] + victim.random.choice(tails))


def swapped_files(victim: Victim) -> None:
    one, two = _file(victim, ".safetensors"), _file(victim, victim.random.choice([".safetensors", "", ".json"]))
    first, second = victim.read(one), victim.read(two)
    victim.write(one, second)
    if victim.random.random() < 0.5:
        victim.write(two, first)


def other_kinds_of_files(victim: Victim) -> None:
    name = _file(victim, victim.random.choice(["", ".json"]))
    path = victim.folder / name
    kind = victim.random.choice(
        ["missing", "empty", "folder", "nowhere", "loop", "fifo", "socket", "zero", "null", "out"]
    )
    victim.remove(name)
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound, contextlib.chdir(path.parent):  # its path must be short
            bound.bind(path.name)
    elif kind != "missing":
        targets = {"loop": path.name, "zero": "/dev/zero", "null": "/dev/null", "out": victim.sound / name}
        path.symlink_to(targets.get(kind, "nowhere"))


def json_values(victim: Victim) -> None:
    name = _file(victim, ".json")
    data = victim.json(name)
    for _ in range(victim.random.choice([1, 1, 1, 3])):
        parent, key = somewhere(victim, data)
        parent[key] = victim.random.choice([*NASTY, *SIZES, *ESCAPES])
    victim.write_json(name, data)


def json_numbers(victim: Victim) -> None:
    """Another number where there is one: sizes, shares, layers, widths, ids."""
    name = _file(victim, ".json")
    data = victim.json(name)
    for _ in range(200):
        parent, key = somewhere(victim, data)
        value = parent[key]
        if isinstance(value, int | float):
            near = [not value] if isinstance(value, bool) else [value + 1, value - 1, 2 * value, value // 2, -value]
            parent[key] = victim.random.choice([*near, *near, *SIZES])
            break
    victim.write_json(name, data)


def json_structure(victim: Victim) -> None:
    name = _file(victim, ".json")
    data = victim.json(name)
    for _ in range(victim.random.choice([1, 1, 2])):
        parent, key = somewhere(victim, data)
        other, place = somewhere(victim, data)
        change = victim.random.choice(["drop", "rename", "copy", "swap", "deep"])
        if change == "drop":
            del parent[key]
        elif change == "rename" and isinstance(parent, dict):
            parent[victim.random.choice([*ESCAPES, f"{key}x", "", "__class__"])] = parent.pop(key)
        elif change == "copy":
            parent[key] = json.loads(json.dumps(other[place]))
        elif change == "swap":
            parent[key], other[place] = json.loads(json.dumps([other[place], parent[key]]))
        else:
            parent[key] = json.loads("[" * 200 + "]" * 200)
        if not data:
            break
    victim.write_json(name, data)


def json_text(victim: Victim) -> None:
    name = _file(victim, ".json")
    raw = victim.read(name)
    texts = [*BROKEN, *DEEP, *GIANT, b"\xef\xbb\xbf" + raw, raw + raw, raw.replace(b"{", b'{"x": ' + DEEP[2] + b",", 1)]
    victim.write(name, victim.random.choice(texts))


def headers(victim: Victim) -> None:
    """Names, dtypes, shapes and places of tensors; the values stay where they are."""
    name, pick = _file(victim, ".safetensors"), victim.random.choice
    if not name.endswith(".safetensors"):
        return json_values(victim)
    entries, start = victim.header(name)
    raw, keys = victim.read(name), [key for key in entries if key != "__metadata__"]
    one, two = pick(keys), pick(keys)
    change = pick(["names", "names", "places", "drop", "rename", "dtype", "shape", "value", "length"])
    if change == "names":
        entries[one], entries[two] = entries[two], entries[one]
    elif change == "places":
        entries[one]["data_offsets"] = entries[two]["data_offsets"]
    elif change == "drop":
        del entries[one]
    elif change == "rename":
        entries[pick([*ESCAPES, one + "x", ""])] = entries.pop(one)
    elif change == "dtype":
        entries[one]["dtype"] = pick(["F16", "BF16", "F32", "I64", "U8", "BOOL", "F8_E4M3", "C64", "", None, 3])
    elif change == "shape":
        shape = entries[one]["shape"]
        entries[one]["shape"] = pick([shape[::-1], [], [*shape, 1], [2**62, 0], [10**30], [-s for s in shape], None])
    elif change == "value":
        entries[one] = pick([None, 3, "x", [], {}])
    text = json.dumps(entries).encode()
    if len(text) <= start - 8:
        text = text.ljust(start - 8)
    length = pick([0, 2**62, 2**64 - 1, len(raw), start]) if change == "length" else len(text)
    victim.write(name, length.to_bytes(8, "little") + text + raw[start:])
    return None


def values_of_tensors(victim: Victim) -> None:
    """Codes, integers, factors, scales, samples or statistics, of one tensor."""
    name, pick = _file(victim, ".safetensors"), victim.random.choice
    if not name.endswith(".safetensors"):
        return json_numbers(victim)
    entries, start = victim.header(name)
    # suffixes such as `factor` are as likely as the many planes
    kinds = sorted({key.rpartition(".")[2] for key in entries if key != "__metadata__"})
    kind = pick(kinds)
    begin, end = pick([entry["data_offsets"] for key, entry in entries.items() if key.rpartition(".")[2] == kind])
    raw = bytearray(victim.read(name))
    first = victim.random.randrange(begin, end) if end > begin else begin
    last = pick([end, min(end, first + 1), min(end, first + 12)])
    size = last - first
    raw[start + first : start + last] = pick(
        [b"\0" * size, b"\xff" * size, b"\x7f\x80" * (size // 2) + b"\x7f" * (size % 2), victim.random.randbytes(size)]
    )
    victim.write(name, bytes(raw))
    return None


def schemes(victim: Victim) -> None:
    """Another encoding, width or group size of a unit, or another dtype of its scales."""
    names, pick = [n for n in (MANIFEST, "plan.json") if (victim.folder / n).exists()], victim.random.choice
    if not names:
        return json_numbers(victim)
    data = victim.json(names[0])
    found = [unit.get("scheme", unit) for unit in data["units"].values()]
    values = {
        "encoding": ["int", "table", "trellis", "unquantized", "TABLE", ""], "width": [*range(10), 16],
        "group_size": [32, 64, 128, 256, 512, 48], "symmetric": [True, False], "scale_dtype": ["float16", "bfloat16"],
    }  # fmt: skip
    for scheme in found if victim.random.random() < 0.1 else [pick(found)]:
        for key in victim.random.sample(sorted(values), pick([1, 1, 2])):
            scheme[key] = pick(values[key])
    victim.write_json(names[0], data)
    return None


MUTATIONS: list[Callable[[Victim], None]] = [
    flipped_bits, flipped_bits, cut_or_longer, swapped_files, other_kinds_of_files, json_values, json_numbers,
    json_numbers, json_structure, json_text, headers, values_of_tensors, schemes,
]  # fmt: skip
