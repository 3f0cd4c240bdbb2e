"""`moqa.merge`: fine-tuned variants of one base in one folder, for a bit per weight and variant."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moqa import __version__
from moqa.errors import MoqaError
from moqa.format.writer import stored_file
from moqa.mixture.elect import agrees, elected, packed_mask
from moqa.mixture.merged import BASE, MERGED, MergedAccount, MergedRecord, MergedVariant
from moqa.models.view import ModelView, open_model
from moqa.originals import folder as original
from moqa.originals.companions import companions_of, copy_companions
from moqa.originals.fingerprint import fingerprint
from moqa.progress import Report, quiet
from moqa.storage.artifact import write_sealed
from moqa.storage.folders import check_free
from moqa.storage.paths import recorded
from moqa.storage.resumable import ResumableRun, as_json, check_space, resumable, tidy

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
# weights of a fine-tuned model point where those of its base do; of two models of one shape, the cosine is near 0
_LEAST_COSINE = 0.5
_SUMS = ("size", "kept", "agree", "count", "dot", "square", "change")


@torch.no_grad()
def merge(
    base: str | Path,
    variants: Mapping[str, str | Path],
    out: str | Path,
    *,
    overwrite: bool = False,
    restart: bool = False,
    report: Report = quiet,
) -> Path:
    """Merge fine-tuned variants of one base without data or training.

    >>> moqa.merge("base", {"math": "math", "code": "code"}, "runs/merged")  # doctest: +SKIP
    PosixPath('runs/merged')

    What a variant changes is approximated by a vector that all share, a mask of one bit per weight, and one number.
    Models are read block by block.

    Args:
        base: folder or Hub id of the model that all variants were fine-tuned from.
        variants: name -> folder or Hub id.
        out: folder to make; `moqa.load`, `moqa generate --variant` and `moqa serve` take it.
        overwrite: replace merged variants that exist at `out`.
        restart: discard what an earlier run has finished.
        report: called with the name of a step, how much of it is done, and its total.

    Raises:
        MoqaError: if there are fewer than two variants, or one is not of the base's shape, tokenizer or weights.

    EMR-Merging (arXiv 2405.17461); the rescaler as in its released code, with a mean per tensor of the model.
    """
    out = Path(out)
    check_free(out, overwrite)
    _check_names(variants)
    folder = original.locate(base)
    identity = fingerprint(folder)
    folders = {name: original.locate(path) for name, path in variants.items()}
    job = as_json({"moqa": __version__, "base": identity, "variants": {n: fingerprint(f) for n, f in folders.items()}})
    if tidy(out) == job:
        return out
    views = {name: open_model(path, keep=False) for name, path in {BASE: folder, **folders}.items()}
    for name in folders:
        _check_alike(views[BASE], views[name], f"variant {name} ({variants[name]})")
    check_space(out, 3 * sum(path.stat().st_size for path in original.weight_files(folder)) + 2**20)
    companions = companions_of(folder)
    with resumable(out, job, overwrite, restart) as work:
        depth = len(views[BASE].blocks)
        for piece in range(depth + 1):
            report("merge", piece, depth + 1)
            if work.done(_step(piece)) is None:
                work.mark_done(_step(piece), _write(views, piece - 1, work.result / _file(piece, depth)))
        report("merge", depth + 1, depth + 1)
        copy_companions(folder, companions, work.result)
        record = MergedRecord(
            moqa=__version__, model=recorded(str(base), out), model_type=views[BASE].model.config.model_type,
            fingerprint=identity, **_made(str(base), variants, folders, work, out),
        )  # fmt: skip
        write_sealed(record, work.result / MERGED)
    return out


def _check_names(variants: Mapping[str, Any]) -> None:
    if len(variants) < 2:
        raise MoqaError(f"{len(variants)} variant has nothing to be merged with", "give two or more")
    for name in variants:
        if name == BASE or not _NAME.fullmatch(name):
            raise MoqaError(
                f"--variant {name}=... is no name of a variant", f"use letters, digits, '_', '-', not {BASE}"
            )


def _check_alike(base: ModelView, variant: ModelView, what: str) -> None:
    """Refuse a variant whose tensors have other names or shapes."""
    ours, theirs = (
        {name: unit.shape for name, unit in view.units.items()}
        | {name: tuple(shape) for name, (_, shape) in view.kept_entries().items()}
        for view in (base, variant)
    )
    other = next((name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)), None)
    if other is not None:
        raise MoqaError(
            f"{what} has {other} {theirs.get(other, 'not at all')}",
            f"the base has it {ours.get(other, 'not at all')}: merge variants of one base",
        )


def _write(views: Mapping[str, ModelView], layer: int, path: Path) -> dict[str, Any]:
    """Write what the base and all variants have in a block, or outside of blocks for -1; returns sums of it."""
    names = [name for name in views if name != BASE]
    tensors: dict[str, Tensor] = {}
    sums = {name: dict.fromkeys(_SUMS, 0.0) for name in names}
    size = {"base": 0, "unified": 0, "masks": 0}
    for parameter, weights in _tensors(views[BASE], layer).items():
        tensors[f"{BASE}.{parameter}"] = weights
        size["base"] += weights.numel() * weights.element_size()
        if not weights.is_floating_point():
            continue
        wide = weights.float()
        vectors = torch.stack([_matching(views[name], layer, parameter) for name in names]) - wide
        # the masks and rescalers are those of the vector as it is stored
        unified = elected(vectors).to(weights.dtype)
        tensors[f"unified.{parameter}"] = unified
        size["unified"] += unified.numel() * unified.element_size()
        for name, vector in zip(names, vectors, strict=True):
            mask, found = agrees(vector, unified.float()), sums[name]
            packed = packed_mask(mask)
            tensors[f"mask.{name}.{parameter}"] = packed
            size["masks"] += packed.numel()
            found["size"] += float(vector.abs().double().mean())
            found["kept"] += float((mask * unified.float()).abs().double().mean())
            found["agree"] += float(mask.sum())
            found["count"] += float((vector != 0).sum())
            found["dot"] += float(((vector + wide) * wide).double().sum())
            found["square"] += float((vector + wide).double().square().sum())
            found["change"] += float(vector.double().square().sum())
    base_square = sum(float(t.double().square().sum()) for n, t in tensors.items() if n.startswith(f"{BASE}."))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    path.chmod(0o644)
    return {"sums": sums, "square": base_square, "bytes": size}


def _tensors(view: ModelView, layer: int) -> dict[str, Tensor]:
    """Tensors of a block's units, or those that are no units for -1, in the dtypes of the file."""
    if layer < 0:
        return {name: tensor.clone() for name, tensor in view.kept_on_disk().items()}
    view.need(layer)
    units = {unit.parameter: unit for unit in view.block_units(layer)}
    return {n: view.model.get_parameter(n).detach().to(view.stored_dtype(unit)) for n, unit in units.items()}


def _matching(view: ModelView, layer: int, name: str) -> Tensor:
    """A variant's tensor, float32."""
    if layer >= 0:
        view.need(layer)
    return (view.kept()[name] if layer < 0 else view.model.get_parameter(name).detach()).float()


def _made(
    base: str, variants: Mapping[str, str | Path], folders: Mapping[str, Path], work: ResumableRun, out: Path
) -> dict[str, Any]:
    """What the sums of all pieces say of each variant, and all bytes.

    Raises:
        MoqaError: if the weights of a variant are not those of the base, changed.
    """
    paths = sorted(work.result.glob("merged-*"))
    notes = [note for piece in range(len(paths)) if (note := work.done(_step(piece)))]
    square, made = sum(note["square"] for note in notes), {}
    for name in variants:
        total = {key: sum(note["sums"][name][key] for note in notes) for key in _SUMS}
        cosine = total["dot"] / max((total["square"] * square) ** 0.5, 1e-30)
        if cosine < _LEAST_COSINE:
            raise MoqaError(
                f"variant {name} ({variants[name]}) was not fine-tuned from {base}",
                f"the cosine of their weights is {cosine:.2f}: merge variants of one base",
            )
        made[name] = MergedVariant(
            model=recorded(str(variants[name]), out), fingerprint=fingerprint(folders[name]),
            rescaler=total["size"] / total["kept"] if total["kept"] else 0.0,
            agreement=total["agree"] / total["count"] if total["count"] else 1.0,
            distance=(total["change"] / square) ** 0.5,
            bytes=sum(note["bytes"]["masks"] for note in notes) // len(variants),
        )  # fmt: skip
    files = {path.name: stored_file(path) for path in paths}
    apart = sum(path.stat().st_size for folder in folders.values() for path in original.weight_files(folder))
    parts = {key: sum(note["bytes"][key] for note in notes) for key in ("base", "unified", "masks")}
    account = MergedAccount(**parts, total=sum(file.bytes for file in files.values()), apart=apart)
    return {"variants": made, "files": files, "account": account}


def _step(piece: int) -> str:
    return f"piece-{piece}"


def _file(piece: int, depth: int) -> str:
    return f"merged-{piece + 1:05}-of-{depth + 1:05}.safetensors"
