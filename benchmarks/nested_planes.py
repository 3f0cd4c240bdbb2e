"""A part of `mixture_study.py`: what it would cost to store a narrower variant as the upper planes of a wider one."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moqa
from moqa.data import Windows
from moqa.evaluation.measure import Reference
from moqa.format.grid import ZERO_STEPS, nearest, to_groups
from moqa.format.planes import pack, unpack, untile_rows
from moqa.format.reader import Checkpoint, open_checkpoint
from moqa.format.tiles import PLANES
from moqa.kernels import PackedMatrix, find_kernels
from moqa.mixture.measure import TokenLosses, token_losses
from moqa.models.view import ModelView, open_model
from moqa.profiling import Profile
from moqa.progress import quiet
from moqa.runtime.packed import computing_with

PAIRS = ((8, 4), (6, 4), (3, 2))  # wide and narrow: the planes of the narrow one are the first of the wide one
Matrices = dict[str, PackedMatrix]


def checkpoint(model: Path, profile: Profile, known: tuple[str, ...], width: int, out: Path) -> Checkpoint:
    """A checkpoint of one width by gptq; one that is there is used again."""
    if not (out / "moqa.json").is_file():
        moqa.quantize(model, moqa.plan(profile, strategy="uniform", widths=(width,), known=known), out, profile=profile)
    return open_checkpoint(out)


def matrices(packed: Checkpoint, view: ModelView) -> Matrices:
    """All units of a checkpoint of one width."""
    found, units = {}, packed.manifest.units
    for layer in range(len(view.blocks)):
        tensors = packed.layer(layer)
        for unit in view.block_units(layer):
            scheme = units[unit.name].scheme
            found[unit.name] = PackedMatrix(scheme, unit.shape, scheme.among(tensors, unit.name, unit.shape))
    return found


def tensors_of(matrix: PackedMatrix) -> dict[str, Tensor]:
    return dict(matrix.named_buffers())


def upper_planes(wide: PackedMatrix, width: int) -> PackedMatrix:
    """The first planes of a matrix, each cell of the narrow grid standing for its middle."""
    tensors, scheme = tensors_of(wide), wide.scheme.model_copy(update={"width": width})
    cell, top = 2 ** (wide.scheme.width - width), 2**wide.scheme.width - 1
    offset = (tensors["zero"].float() * top / ZERO_STEPS - (cell - 1) / 2) / cell
    return PackedMatrix(scheme, wide.shape, {
        **{f"p{index}": tensors[f"p{index}"] for index in range(len(PLANES[width]))},
        "scale": tensors["scale"] * cell, "zero": as_zero(offset, width),
    })  # fmt: skip


def with_lower_planes(narrow: PackedMatrix, weights: Tensor, width: int) -> PackedMatrix:
    """A wider matrix with all planes of a narrow one, and what is nearest to the original in its cells."""
    tensors, scheme = tensors_of(narrow), narrow.scheme.model_copy(update={"width": width})
    cell, top = 2 ** (width - narrow.scheme.width), 2**narrow.scheme.width - 1
    zero = as_zero(tensors["zero"].float() * top / ZERO_STEPS * cell + (cell - 1) / 2, width)
    rows, features = narrow.shape
    scale = (tensors["scale"] / cell).contiguous()
    steps = untile_rows(scale, rows).float()[..., None]
    offset = untile_rows(zero, rows).float()[..., None] * (2**width - 1) / ZERO_STEPS
    wanted = nearest(to_groups(weights.float(), scheme.group_size), steps, offset, torch.tensor(2.0**width - 1))
    first = unpack(narrow.planes, narrow.scheme.width, narrow.shape).int() * cell
    integers = wanted.flatten(-2)[..., :features].int().clamp(min=first, max=first + cell - 1).to(torch.uint8)
    planes = pack(integers, width)
    assert all(torch.equal(one, other) for one, other in zip(planes, narrow.planes, strict=False))
    stored = {f"p{index}": plane.contiguous() for index, plane in enumerate(planes)}
    return PackedMatrix(scheme, narrow.shape, stored | {"scale": scale, "zero": zero})


def as_zero(offset: Tensor, width: int) -> Tensor:
    """Zero-points as they are stored."""
    return (offset * ZERO_STEPS / (2**width - 1)).round().clamp(0, ZERO_STEPS).to(torch.uint8)


def losses(
    view: ModelView, found: Matrices, windows: list[Windows], reference: Reference
) -> dict[str, TokenLosses]:  # fmt: skip
    """Losses of the original with some matrices in place of its own."""
    with ExitStack() as stack:
        for layer in range(len(view.blocks)):
            stack.enter_context(computing_with(view, layer, found, find_kernels("reference")))
        return token_losses(view.model, windows, reference, quiet)


def nested(study: Any, model: Path, profile: Profile, known: tuple[str, ...], runs: Path, about: Mapping) -> None:
    """Rows of both widths of a pair: each by gptq alone, the narrow one cut out of the wide one, the wide one built on
    the narrow one.
    """
    view, scored = open_model(model), dict[str, dict[str, TokenLosses]]()
    for wide, narrow in PAIRS:
        packed = {w: checkpoint(model, profile, known, w, runs / f"{w}") for w in (wide, narrow)}
        found = {w: matrices(one, view) for w, one in packed.items()}
        made = {f"{w} bits alone": found[w] for w in packed}
        made[f"{narrow} bits, upper planes of {wide}"] = {n: upper_planes(m, narrow) for n, m in found[wide].items()}
        made[f"{wide} bits on the planes of {narrow}"] = {
            name: with_lower_planes(matrix, view.weight(view.units[name]), wide)
            for name, matrix in found[narrow].items()
        }
        shared = sum(plane.numel() for matrix in found[narrow].values() for plane in matrix.planes)
        sizes = {"bytes_total": sum(one.bytes for one in packed.values()), "bytes_resident": packed[wide].bytes}
        for name, units in made.items():
            if name not in scored:
                scored[name] = losses(view, units, study.test, study.reference)
            study.add({**about, **sizes, "bits": wide, "variants": 2, "shared": shared}, "variant", name, scored[name])
