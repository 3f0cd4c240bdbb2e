"""Which tensors a GGUF file of a model has, and in which type."""

from collections.abc import Mapping
from pathlib import Path

import torch

from moqa.errors import MoqaError
from moqa.format.layout import Entry
from moqa.format.scheme import Scheme
from moqa.gguf.families import find_family, is_full
from moqa.gguf.file import PLAIN, GgufFile, GgufTensor
from moqa.models.load import read_config
from moqa.tasks.names import depth


def file_of(
    folder: Path, kept: Mapping[str, Entry], units: Mapping[str, tuple[tuple[int, int], Scheme, torch.dtype]]
) -> GgufFile:
    """The file of a model: tensors that are kept, then units; the matrices of all experts of a layer are one tensor.

    >>> units = {name: (u.shape, Scheme(encoding="q4_k", width=4), torch.bfloat16) for name, u in view.units.items()}
    >>> file_of(view.folder, view.kept_entries(), units).bytes > 15e6
    True

    Args:
        folder: of the original.
        kept: name -> dtype and shape of the tensors that are no units.
        units: name -> [out, in] shape, scheme, and dtype of its original.

    Raises:
        MoqaError: if llama.cpp does not run the model, or one type cannot hold what it has in one tensor.
    """
    config = read_config(folder)
    family, layers = find_family(config), depth(config)
    tensors = [_kept(family.name(name, layers), *entry) for name, entry in kept.items()]
    stacks: dict[str, list[str]] = {}
    for name in units:
        stacks.setdefault(family.name(f"{name}.weight", layers), []).append(name)
    for theirs, names in stacks.items():
        shape, scheme, dtype = units[names[0]]
        different = next((name for name in names if units[name][1] != scheme), None)
        if different is not None:
            raise MoqaError(
                f"{theirs} would hold {names[0]} and {different} in different types",
                "llama.cpp has one for all experts of a layer: plan with --engine llama.cpp",
            )
        kind = dtype if scheme.is_unquantized else scheme.encoding
        if not (scheme.is_unquantized or scheme.is_foreign):
            raise MoqaError(f"{names[0]} is planned as {scheme.encoding}", "llama.cpp has no such type")
        if not scheme.holds(shape):
            raise MoqaError(f"{names[0]} has rows of {shape[1]} weights", f"{kind} needs a multiple of its block")
        stacked = (len(names), *shape) if ".experts." in names[0] else shape
        tensors.append(GgufTensor(theirs, stacked, kind))
    return GgufFile(folder, tensors)


def _kept(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> GgufTensor:
    slim = tuple(side for side in shape if side != 1) or (1,)
    full = is_full(name, slim) or dtype not in PLAIN
    return GgufTensor(name, slim, torch.float32 if full else dtype)
