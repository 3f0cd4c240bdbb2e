"""Manifests that say something else, with and without their checksum made again."""

import json

from hostile.victim import (
    BROKEN,
    DEEP,
    GIANT,
    MANIFEST,
    NASTY,
    REFUSED,
    SEALED,
    Allowed,
    Victim,
    somewhere,
)

from moqa.format.manifest import FORMAT


def manifest_fields(victim: Victim) -> Allowed:
    data = victim.json(MANIFEST)
    for _ in range(victim.random.choice([1, 1, 1, 3])):
        parent, key = somewhere(victim, data)
        parent[key] = victim.random.choice(NASTY)
    if victim.random.random() < 0.2:
        victim.write_json(MANIFEST, data)
        return victim.unsealed_manifest()
    victim.write_manifest(data)
    return SEALED


def plausible_manifest_fields(victim: Victim) -> Allowed:
    data = victim.json(MANIFEST)
    while True:
        parent, key = somewhere(victim, data)
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


def manifest_structure(victim: Victim) -> Allowed:
    data, pick = victim.json(MANIFEST), victim.random.choice
    for _ in range(victim.random.choice([1, 1, 2])):
        parent, key = somewhere(victim, data)
        other, place = somewhere(victim, data)
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


def unit_fields(victim: Victim) -> Allowed:
    data = victim.json(MANIFEST)
    unit = data["units"][victim.random.choice(sorted(data["units"]))]
    field = victim.random.choice(sorted(UNIT_FIELDS))
    (unit["scheme"] if field in unit["scheme"] else unit)[field] = victim.random.choice(UNIT_FIELDS[field])
    victim.write_manifest(data)
    return SEALED


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


def newer_formats(victim: Victim) -> Allowed:
    data = victim.json(MANIFEST)
    newer = [FORMAT + 1, FORMAT + 2, 10**30, str(FORMAT + 1), None, [], 1.5, float("inf")]
    data["format"] = victim.random.choice(newer)
    if victim.random.random() < 0.3:
        data["later"] = victim.random.choice(NASTY)
    victim.write_manifest(data)
    return REFUSED


MUTATIONS = [manifest_fields, plausible_manifest_fields, manifest_structure, unit_fields, manifest_text, newer_formats]
