"""An attacker who lays the files out again: they are all that their manifest says."""

import hashlib

from hostile.victim import (
    HARMLESS,
    MANIFEST,
    SEALED,
    TRANSFORMERS,
    WEIGHTS,
    Allowed,
    Victim,
)


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


MUTATIONS = [rebuilt_units, rebuilt_kept_tensors]
