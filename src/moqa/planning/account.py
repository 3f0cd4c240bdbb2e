"""Exact bytes of a plan, in the files of the engine that it is for."""

from collections.abc import Mapping
from pathlib import Path

import torch

from moqa.format.layout import Entry, entry_bytes, shards
from moqa.format.scheme import Scheme
from moqa.gguf.file import ALIGNMENT
from moqa.methods.ggml import encoders
from moqa.originals import folder as original
from moqa.planning.engines import ENGINES, OWN
from moqa.planning.gguf_layout import file_of
from moqa.planning.record import Account
from moqa.profiling import Profile


def account_of(profile: Profile, schemes: Mapping[str, Scheme], engine: str = OWN) -> Account:
    """Bytes of a profile's units, stored by some schemes, and of all other tensors.

    >>> account_of(profile, plan.units) == plan.account
    True

    Args:
        profile: of the model.
        schemes: unit name -> scheme; units that it lacks are not counted.
        engine: whose files these are.
    """
    if ENGINES[engine].export == "gguf":
        return _in_gguf(profile, schemes, original.locate(profile.original))
    units = {u.name: (u.layer, u.shape, schemes[u.name]) for u in profile.record.units if u.name in schemes}
    kept = kept_entries(profile)
    return _account(
        profile,
        units=sum(scheme.stored_bytes(shape) for _, shape, scheme in units.values()),
        kept=sum(entry_bytes(entry) for entry in kept.values()),
        headers=sum(len(shard.header()) for shard in shards(kept, profile.record.layers, units)),
    )


def fixed_bytes(profile: Profile, engine: str) -> int:
    """Bytes of the weight files that no choice of schemes changes, at most."""
    if ENGINES[engine].export != "gguf":
        return account_of(profile, {}, engine).checkpoint
    plain = account_of(profile, dict.fromkeys((u.name for u in profile.record.units), Scheme(width=16)), engine)
    # how much padding follows a tensor depends on its type
    return plain.kept + plain.headers + ALIGNMENT * len(profile.record.units)


def kept_entries(profile: Profile) -> dict[str, Entry]:
    """Stored dtype and shape of the tensors that are not units."""
    return {name: (getattr(torch, dtype), shape) for name, (dtype, shape) in profile.record.kept.items()}


def _in_gguf(profile: Profile, schemes: Mapping[str, Scheme], folder: Path) -> Account:
    """Settings, tokenizer and names, and the padding between tensors, are counted as headers."""
    encoders()  # names the packages if they are missing
    kept = kept_entries(profile)
    units = {
        unit.name: (unit.shape, schemes[unit.name], torch.bfloat16)
        for unit in profile.record.units
        if unit.name in schemes
    }
    file = file_of(folder, kept, units)
    sizes = [tensor.bytes for tensor in file.tensors]
    return _account(
        profile,
        units=sum(sizes[len(kept) :]), kept=sum(sizes[: len(kept)]), headers=file.bytes - sum(sizes),
    )  # fmt: skip


def _account(profile: Profile, units: int, kept: int, headers: int) -> Account:
    return Account(
        units=units, kept=kept, headers=headers, weights=sum(u.weights for u in profile.record.units),
        kept_weights=sum(torch.Size(shape).numel() for _, shape in profile.record.kept.values()),
    )  # fmt: skip
