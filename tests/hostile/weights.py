"""Weight files that are cut, flipped, swapped, or whose headers lie."""

import json
import os

from hostile.victim import (
    BROKEN,
    CONFIG,
    DEEP,
    GIANT,
    HARMLESS,
    INDEX,
    LOADERS,
    MANIFEST,
    NASTY,
    REFUSED,
    UNVERIFIED,
    WEIGHTS,
    Allowed,
    Victim,
)


def cut_at_a_border(victim: Victim) -> Allowed:
    name = victim.random.choice(WEIGHTS)
    entries, start = victim.header(name)
    borders = [0, 8, start, *(start + offset for entry in entries.values() for offset in entry["data_offsets"])]
    raw = victim.read(name)
    cut = min(max(victim.random.choice(borders) + victim.random.choice([0, 0, -1, 1, -64]), 0), len(raw) - 1)
    victim.write(name, raw[:cut])
    victim.maybe_seal()
    return REFUSED


def cut_or_extend_anywhere(victim: Victim) -> Allowed:
    name = victim.random.choice(WEIGHTS)
    raw = victim.read(name)
    cut = raw[: victim.random.randrange(len(raw))]
    longer = raw + victim.random.choice([b"\0", b"\0" * 64, victim.random.randbytes(1000), raw])
    middle = cut + raw[len(cut) + victim.random.choice([1, 2, 64]) :]
    victim.write(name, victim.random.choice([cut, longer, middle]))
    victim.maybe_seal()
    return REFUSED


def flip_a_byte(victim: Victim) -> Allowed:
    name = victim.random.choice([*WEIGHTS, MANIFEST])
    raw = bytearray(victim.read(name))
    # headers are a small part of a file and where most can go wrong
    place = victim.random.randrange(min(len(raw), victim.random.choice([8, 100, 8000, len(raw)])))
    raw[place] ^= victim.random.randrange(1, 256)
    victim.write(name, bytes(raw))
    return victim.unsealed_manifest() if name == MANIFEST else victim.maybe_seal()


def flip_a_plane_or_zero(victim: Victim) -> Allowed:
    name, begin, end = victim.some(("p0", "p1", "p2", "zero", "factor"))
    raw = bytearray(victim.read(name))
    for _ in range(victim.random.choice([1, 1, 100])):
        raw[victim.random.randrange(begin, end)] = victim.random.randrange(256)
    if victim.random.random() < 0.3:
        raw[begin:end] = victim.random.choice([b"\0", b"\xff", b"\xaa"]) * (end - begin)
    victim.write(name, bytes(raw))
    # with scales as they were, any integers, codes and factors are numbers
    return victim.maybe_seal(Allowed(differ=(UNVERIFIED,)), Allowed(differ=LOADERS))


def bad_scales(victim: Victim) -> Allowed:
    name, begin, end = victim.some(("scale",))
    raw = bytearray(victim.read(name))
    place = begin + 2 * victim.random.randrange((end - begin) // 2)
    bits = victim.random.choice([0x7FC0, 0x7F80, 0xFF80, 0xBF80, 0xFFFF, 0x8001])
    raw[place : place + 2] = bits.to_bytes(2, "little")
    victim.write(name, bytes(raw))
    victim.maybe_seal()
    return REFUSED


def other_scales(victim: Victim) -> Allowed:
    name, begin, end = victim.some(("scale",))
    raw = bytearray(victim.read(name))
    for place in range(begin, end, 2):
        bits = victim.random.choice([0x0000, 0x0001, 0x7F7F, victim.random.randrange(0x7F80)])
        raw[place : place + 2] = bits.to_bytes(2, "little")
    victim.write(name, bytes(raw))
    return victim.maybe_seal()


def header_lengths_that_lie(victim: Victim) -> Allowed:
    name = victim.random.choice(WEIGHTS)
    raw = victim.read(name)
    length = int.from_bytes(raw[:8], "little")
    near = [length - 1, length + 1, length - 64, length + 64, len(raw), len(raw) - 8]
    lies = [0, 1, 2, 7, 8, *near, 10**8, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64 - 8]
    victim.write(name, victim.random.choice(lies).to_bytes(8, "little") + raw[8:])
    victim.maybe_seal()
    return REFUSED


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


def swapped_files(victim: Victim) -> Allowed:
    one, two = victim.random.sample(WEIGHTS, 2)
    first, second = victim.read(one), victim.read(two)
    victim.write(one, second)
    if victim.random.random() < 0.5:
        victim.write(two, first)
    victim.maybe_seal()
    return REFUSED


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


MUTATIONS = [
    cut_at_a_border,
    cut_or_extend_anywhere,
    flip_a_byte,
    flip_a_plane_or_zero,
    bad_scales,
    other_scales,
    header_lengths_that_lie,
    header_entries,
    swapped_files,
    other_kinds_of_files,
]
