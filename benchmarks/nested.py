"""Nested widths on the reference model: one checkpoint at 2, 3, 4 and 8 bits beside a checkpoint made for each of them.

Controls: a width as the upper planes of the widest, alone and with a bit that rounds them (grids that are aligned).
Rows that are in docs/results/nested.json are not measured again; remove it to begin anew. Writes that file, the page
docs/results/nested.md, and the rows to runs/trained/summary.json. A quarter of an hour of one core.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from claims import claim
from demo import KNOWN, MODEL, NOVEL, texts
from nested_planes import as_zero
from related_rows import Scores
from torch import Tensor
from trained_rows import ROOT, RUNS, add, known

import moqa
from moqa.format.encodings.integers import stored_grid
from moqa.format.grid import ZERO_STEPS, Grid
from moqa.format.manifest import MANIFEST
from moqa.format.planes import unpack
from moqa.format.reader import Checkpoint
from moqa.format.tiles import PLANES
from moqa.methods import gptq, rtn
from moqa.models.view import open_model
from moqa.profiling import Profile
from moqa.runtime.load import load_packed
from moqa.training.write import write_copy

WIDTHS, WIDEST = (2, 3, 4, 8), 8
WANTED = 1.25  # times the divergence of a checkpoint of the width alone
SAMPLES, WINDOWS, CONTEXT, SEED = 64, 32, 256, 0
FOLDER, ROWS = RUNS / "nested", ROOT / "docs" / "results" / "nested.json"
PAGE = ROWS.with_suffix(".md")
ALONE, NESTED, ALIGNED, PREFIX = "alone", "nested", "aligned", "planes"
NAMES = {
    ALONE: "a checkpoint of this width alone", NESTED: "**nested**", PREFIX: "upper planes of 8 bits",
    ALIGNED: "nested, cells of 8 bits as grids",
}  # fmt: skip
ROLES = ("known", "novel")
Row = dict[str, Any]


class Study:
    """The rows, and what they are measured with, made when a row needs it."""

    def __init__(self) -> None:
        self.rows: list[Row] = json.loads(ROWS.read_text())["rows"] if ROWS.is_file() else []

    @cached_property
    def profile(self) -> Profile:
        return moqa.profile(MODEL, texts("calib", KNOWN), FOLDER / "profile", samples=SAMPLES, seed=SEED)

    @cached_property
    def scores(self) -> Scores:
        return Scores(open_model(MODEL), texts("test", (*KNOWN, *NOVEL)), CONTEXT, WINDOWS, KNOWN)

    def row(self, way: str, width: int, made: Callable[[], Checkpoint]) -> Row:
        """A row; `made` returns the checkpoint that it measures."""
        there = [row for row in self.rows if (row["way"], row["bits"]) == (way, width)]
        if there:
            return there[0]
        began = time.perf_counter()
        packed = made()
        seconds = time.perf_counter() - began
        found = self.scores.of(load_packed(packed, kernels="reference"))
        row = {
            "way": way, "bits": width, "bytes": packed.bytes, "bits_per_weight": packed.bits_per_weight,
            "seconds": round(seconds, 1), **{name: float(f"{value:.6g}") for name, value in found.items()},
        }  # fmt: skip
        if way in (NESTED, ALIGNED):
            whole = moqa.open_checkpoint(packed.folder, verify=False)
            row["bytes_file"] = whole.bytes + whole.nested_bytes
        self.rows.append(row)
        self.store()
        print(json.dumps(row), flush=True)
        return row

    def store(self) -> None:
        """Write the rows."""
        ROWS.write_text(json.dumps({"rows": self.rows}, indent=1, sort_keys=True) + "\n")

    def quantized(self, name: str, width: int, widths: tuple[int, ...] = ()) -> Path:
        """A checkpoint by gptq, of one width or nested ones; one that is there is used again."""
        out = FOLDER / name
        if not (out / MANIFEST).is_file():
            plan = moqa.plan(self.profile, strategy="uniform", widths=(width,), encodings=("int",))
            moqa.quantize(MODEL, plan, out, profile=self.profile, widths_nested=widths)
        return out


class UpperPlanes:
    """Units as the upper planes of a wider checkpoint, each cell of the narrow grid standing for its middle."""

    def __init__(self, wide: Checkpoint, width: int) -> None:
        self._wide, self._width = wide, width

    def stored(self, block: int | None) -> Mapping[str, Tensor]:
        """Tensors of a block as a shard has them."""
        found, tensors = dict[str, Tensor](), self._wide.layer(block)
        units = {} if block is None else self._wide.manifest.units
        for name, unit in units.items():
            if unit.layer == block:
                cell, top = 2 ** (unit.scheme.width - self._width), 2**unit.scheme.width - 1
                offset = (tensors[f"{name}.zero"].float() * top / ZERO_STEPS - (cell - 1) / 2) / cell
                planes = [tensors[f"{name}.p{index}"] for index in range(len(PLANES[unit.scheme.width]))]
                codes = unpack(planes, unit.scheme.width, unit.shape) >> unit.scheme.width - self._width
                kernels = gptq.find_grid_kernels(codes.device)
                found |= {f"{name}.p{index}": plane for index, plane in enumerate(kernels.pack(codes, self._width))}
                found[f"{name}.scale"] = tensors[f"{name}.scale"] * cell
                found[f"{name}.zero"] = as_zero(offset, self._width)
        return found


@contextmanager
def aligned_grids() -> Iterator[None]:
    """While it is in force, grids of narrower widths are cells of that of the widest, and not fitted."""
    fit = gptq.fit_grid

    def cells(weights: Tensor, scheme: Any, widths: Tensor | None = None, importance: Tensor | None = None) -> Any:
        width = scheme.width if widths is None else int(widths.max())
        full = fit(weights, scheme, torch.full(weights.shape[:2], WIDEST), importance)
        if width == WIDEST:
            return full
        cell, top, zero = 2 ** (WIDEST - width), 2**WIDEST - 1, full.grid.zero
        offset = (zero.float() * top / ZERO_STEPS - (cell - 1) / 2) / cell
        grid = Grid(
            full.grid.scale * cell, as_zero(offset, width), scheme.group_size, torch.full_like(offset, 2.0**width - 1)
        )
        return type(full)(grid, grid.encode(weights), full.error)

    gptq.fit_grid = rtn.fit_grid = cells
    try:
        yield
    finally:
        gptq.fit_grid = rtn.fit_grid = fit


def measure(study: Study) -> None:
    """All rows. Of the widest width, the nested checkpoint has the files of the one alone."""
    for width in WIDTHS:
        study.row(NESTED, width, partial(opened, study, "out", width))
    for width in WIDTHS[:-1]:
        row = study.row(NESTED, width, partial(opened, study, "out", width))
        if "farther" not in row:
            row["farther"] = round(farther(study, width), 4)
            study.store()
        study.row(ALONE, width, partial(alone, study, width))
    for width in WIDTHS[:-1]:
        study.row(PREFIX, width, partial(upper_planes, study, width))
    with aligned_grids():
        for width in WIDTHS[:-1]:
            study.row(ALIGNED, width, partial(opened, study, "aligned", width))


def farther(study: Study, width: int) -> float:
    """Share of the weights whose bit is not that of the nearest integer."""
    wide, narrow = (opened(study, "out", bits) for bits in (WIDEST, width))
    count = total = 0
    for block in range(wide.manifest.layers):
        stored, made = wide.layer(block), narrow.layer(block)
        for name, unit in narrow.manifest.units.items():
            if unit.layer == block:
                full = wide.manifest.units[name].scheme
                values = full.storage.decode(full, unit.shape, full.among(stored, name, unit.shape))
                tensors = unit.scheme.among(made, name, unit.shape)
                codes = unpack([tensors[f"p{index}"] for index in range(len(PLANES[width]))], width, unit.shape)
                grid = stored_grid(unit.scheme, unit.shape[0], tensors)
                count, total = count + int((codes != grid.encode(values)).sum()), total + codes.numel()
    return count / total


def opened(study: Study, name: str, width: int) -> Checkpoint:
    """A nested checkpoint at one of its widths."""
    return moqa.open_checkpoint(study.quantized(name, WIDEST, WIDTHS), width=width)


def alone(study: Study, width: int) -> Checkpoint:
    """A checkpoint made for one width."""
    return moqa.open_checkpoint(study.quantized(f"{width}", width))


def upper_planes(study: Study, width: int) -> Checkpoint:
    """The upper planes of the widest width, as a checkpoint."""
    out = FOLDER / "planes"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_copy(alone(study, width), out, MODEL, trained=UpperPlanes(opened(study, "out", WIDEST), width))
    return moqa.open_checkpoint(out)


def summary(rows: list[Row]) -> None:
    """Add the rows to those of the other trained systems."""
    there = {row["setting"] for row in known("oqat")}
    new = [
        {
            "system": "oqat", "model": "reference", "setting": f"{row['way']} {row['bits']} bits", "seed": SEED,
            "bits_per_weight": row["bits_per_weight"], "bytes": row["bytes"], "kl_known": row["kl_known"],
            "kl_novel": row["kl_novel"], "accuracy": None, "seconds": row["seconds"], "peak_bytes": None,
        }
        for row in rows
    ]  # fmt: skip
    add([row for row in new if row["setting"] not in there])


def write_page(rows: list[Row]) -> None:
    """Write docs/results/nested.md."""
    by = {(row["way"], row["bits"]): row for row in rows}
    # of the widest width, all ways have the same files
    by |= {(way, WIDEST): by[NESTED, WIDEST] for way in (ALONE, ALIGNED, PREFIX)}

    def ratio(way: str, bits: int, role: str) -> float:
        return by[way, bits][f"kl_{role}"] / by[ALONE, bits][f"kl_{role}"]

    lines, claims = list[str](), list[str]()
    for bits in WIDTHS:
        for way, name in NAMES.items():
            row = by.get((way, bits))
            if row is None or (bits == WIDEST and way not in (ALONE, NESTED)):
                continue
            times = "" if way == ALONE else " / ".join(f"{ratio(way, bits, role):.2f}" for role in ROLES)
            spread = " / ".join(f"{row[f'kl_{role}']:#.3g} ± {row[f'kl_{role}_interval']:.1g}" for role in ROLES)
            lines.append(f"| {bits} | {name} | {spread} | {times} |")
        worst = max(ROLES, key=lambda role: ratio(NESTED, bits, role))
        claims.append(claim(
            ratio(NESTED, bits, worst) <= WANTED,
            f"nested {bits} bits have at most 1.25 x the KL of a checkpoint of this width alone, known and novel; "
            f"the larger ratio ({worst}): {ratio(NESTED, bits, worst):.2f}; wanted {WANTED}",
        ))  # fmt: skip
    sizes = {f"{bits} bits alone": by[ALONE, bits]["bytes"] for bits in WIDTHS}
    apart, wide, one = sum(sizes.values()), sizes[f"{WIDEST} bits alone"], by[NESTED, WIDEST]["bytes_file"]
    sizes |= {"the four of them": apart, "**nested: one folder for all four**": one}
    claims.append(claim(
        one < apart, f"one folder takes, of the bytes of four: {100 * one / apart:.0f} %; of those of {WIDEST} bits "
        f"alone it takes {one / wide:.2f} times as many",
    ))  # fmt: skip
    PAGE.write_text(_PAGE.format(
        lines="\n".join(lines), claims="\n".join(claims), windows=WINDOWS, context=CONTEXT, samples=SAMPLES,
        farther=round(100 * mean(by[NESTED, bits]["farther"] for bits in WIDTHS[:-1])),
        sizes="\n".join(f"| {name} | {size:,} | {100 * size / apart:.0f} % |" for name, size in sizes.items()),
    ))  # fmt: skip


def main() -> None:
    """Measure what is not measured yet, and write the page."""
    torch.set_num_threads(1)
    study = Study()
    measure(study)
    summary(study.rows)
    write_page(study.rows)


_PAGE = """# Nested widths

Command: `make trained-study`
(`benchmarks/nested.py`; rows in [nested.json](nested.json)).

`moqa quantize --widths-nested 2,3,4,8` on the reference model: integers of 8 bits by gptq, and for 2, 3 and 4 bits
scales of their own and a bit for each weight that rounds its 8-bit value up or down
([format](../format.md#nested-widths)). gptq chooses the bits, with inputs from blocks of that width. Beside it a
checkpoint made for each width alone by a uniform plan and gptq, of the same profile ({samples} windows of wiki and
novels each, as much of the model's own text), and two controls: the upper planes of the 8-bit integers, each cell
standing for its middle; and nested widths whose grids are such cells, of a grid fitted at 8 bits with inputs of that
width, instead of grids fitted at the width. KL from the original in nats on {windows} windows of {context} held-out
tokens per text, with 95 % intervals over windows, and how many times that of the width alone: mean of wiki and novels /
of python, math, german and french, which no fit saw.

| bits | | KL, known / novel | x alone |
|---:|---|---:|---:|
{lines}

{claims}

| | bytes | of the four |
|---|---:|---:|
{sizes}

## What it shows
Upper planes alone are the wide integers rounded down, and an integer that is nearly exact does not say which of its two
neighbours gptq would take: at 2, 3 and 4 bits it takes the farther one for {farther} % of the weights. A bit says it.
What is lost on known texts is weights that gptq alone would move further. On novel texts that is a gain: integers that
stay next to the original fit the samples less. At 8 bits the folder has, byte for byte, the files of 8 bits alone.

**Grids.** Cells of a grid of 8 bits reach over nearly the whole range of a group, where a grid that is fitted at 2 bits
is narrower. With gptq, which moves weights to make up for others, the wider one is better at 2 bits, better even than
the checkpoint of 2 bits alone; at 3 and 4 bits the two differ by less than the intervals. So grids could be those of
the wide integers, and the scales of narrower widths be left out: 0.375 bits of a weight for each. That is not built.

OQAT (arXiv 2010.04354) shares integers by training networks whose narrower widths are upper bits, without a bit for
each width. That was not trained here: its claim is neither confirmed nor refuted. One seed, one model.
"""


if __name__ == "__main__":
    main()
