"""MPQ-DMv2's parts on the reference model: a binary branch for what rounding leaves, and low-rank terms from its SVD.

Beside integers and codes, all by rounding to nearest. Adds rows to runs/trained/summary.json and writes
docs/results/mpq-dm.md; minutes of one core.
"""

import resource
import time
from collections.abc import Callable
from statistics import mean

import torch
from demo import KNOWN, MODEL, NOVEL, texts
from torch import Tensor
from trained_rows import ROOT, Row, add, known

from moqa.data.windows import cut_windows
from moqa.format.scheme import Scheme
from moqa.kernels import PackedMatrix
from moqa.methods import METHODS
from moqa.models.view import open_model
from moqa.tasks.causal_lm import load_tokenizer

PAGE = ROOT / "docs" / "results" / "mpq-dm.md"
CONTEXT, WINDOWS, GROUP = 256, 3, 64
# what a matrix becomes, and its stored bytes
Way = Callable[[Tensor], tuple[Tensor, float]]


def plain(width: int, encoding: str = "int", group: int = GROUP) -> Way:
    scheme = Scheme(width=width, group_size=group, encoding=encoding)

    def make(weight: Tensor) -> tuple[Tensor, float]:
        shape = (len(weight), weight.shape[1])
        return PackedMatrix(scheme, shape, METHODS["rtn"].store(weight, scheme)).dense(), scheme.stored_bytes(shape)

    return make


def salient(error: Tensor, share: float) -> Tensor:
    """Rows that lose most."""
    return error.square().sum(1).argsort(descending=True)[: round(share * len(error))]


def residual(share: float) -> Way:
    """2 bits, and for the rows that lose most the sign of what they lost, times its mean size in each group."""

    def make(weight: Tensor) -> tuple[Tensor, float]:
        found, size = plain(2)(weight)
        rows = salient(weight - found, share)
        left = (weight - found)[rows].reshape(len(rows), -1, GROUP)
        step = left.abs().mean(-1, keepdim=True).bfloat16().float()
        found = found.clone()
        found[rows] += (step * left.sign()).reshape(len(rows), -1)
        return found, size + (len(weight) + len(rows) * weight.shape[1]) / 8 + 2 * step.numel()

    return make


def wider(share: float) -> Way:
    """2 bits, and 3 for the rows that lose most: the control of `residual`."""

    def make(weight: Tensor) -> tuple[Tensor, float]:
        found, size = plain(2)(weight)
        rows = salient(weight - found, share)
        found = found.clone()
        found[rows] = plain(3)(weight)[0][rows]
        return found, size + (len(weight) + len(rows) * weight.shape[1]) / 8

    return make


def low_rank(rank: int) -> Way:
    """2 bits, and the first singular vectors of what they lost, in 16 bits."""

    def make(weight: Tensor) -> tuple[Tensor, float]:
        found, size = plain(2)(weight)
        u, s, v = torch.linalg.svd(weight - found, full_matrices=False)
        root = s[:rank].sqrt()
        left, right = (u[:, :rank] * root).bfloat16().float(), (root[:, None] * v[:rank]).bfloat16().float()
        return found + left @ right, size + 2 * (left.numel() + right.numel())

    return make


WAYS: dict[str, Way] = {
    "2 bits": plain(2), "3 bits": plain(3), "2 bits of a trellis": plain(2, "trellis", 256),
    "2 bits, residual of half of the rows": residual(0.5), "2 bits, 3 for five of eight rows": wider(0.625),
    "2 bits, residual of all rows": residual(1.0), "2 bits, rank 4": low_rank(4), "2 bits, rank 16": low_rank(16),
}  # fmt: skip


@torch.no_grad()
def measure() -> list[Row]:
    view, tokenizer = open_model(MODEL), load_tokenizer(MODEL)
    original = {name: view.weight(unit).float().clone() for name, unit in view.units.items()}
    windows = {
        text.name: cut_windows(text, tokenizer, CONTEXT, WINDOWS).inputs for text in texts("test", KNOWN + NOVEL)
    }
    truth = {name: view.model(ids).logits.float().log_softmax(-1) for name, ids in windows.items()}
    rows, energy = list[Row](), sum(float(weight.square().sum()) for weight in original.values())
    for setting, make in WAYS.items():
        began, size, error = time.perf_counter(), 0.0, 0.0
        for name, unit in view.units.items():
            found, stored = make(original[name])
            size, error = size + stored, error + float((found - original[name]).square().sum())
            view.set_weight(unit, found.to(view.weight(unit).dtype))
        kl = {
            name: float((its.exp() * (its - view.model(windows[name]).logits.float().log_softmax(-1))).sum(-1).mean())
            for name, its in truth.items()
        }
        rows.append({
            "system": "mpq-dm", "model": "reference", "setting": setting, "seed": 0, "bytes": round(size),
            "bits_per_weight": 8 * size / sum(weight.numel() for weight in original.values()),
            "error": error / energy, "kl_known": mean(kl[name] for name in KNOWN),
            "kl_novel": mean(kl[name] for name in NOVEL), "accuracy": None,
            "seconds": round(time.perf_counter() - began, 1),
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def write_page() -> None:
    rows = {row["setting"]: row for row in known("mpq-dm")}
    lines = [
        f"| {row['setting']} | {row['bits_per_weight']:.2f} | {row['error']:.4f} | {row['kl_known']:.4f} | "
        f"{row['kl_novel']:.4f} |"
        for row in sorted(rows.values(), key=lambda row: row["bits_per_weight"])
    ]
    half, control = rows["2 bits, residual of half of the rows"], rows["2 bits, 3 for five of eight rows"]
    holds = half["error"] < control["error"]
    claim = (
        f"- {'holds' if holds else 'MISS '}  a binary branch for the rows that lose most has less error than a bit "
        f"more for such rows, {control['error']:.4f} at the same bytes: {half['error']:.4f} (arXiv 2507.04290)"
    )
    PAGE.write_text(_PAGE.format(lines="\n".join(lines), claim=claim))


def main() -> None:
    torch.set_num_threads(1)
    if not known("mpq-dm"):
        add(measure())
    write_page()


_PAGE = """# A binary branch, and low-rank terms

Command: `python benchmarks/mpq_dm.py`
(the reference model; rows in runs/trained/summary.json).

MPQ-DMv2 (arXiv 2507.04290) stores, for diffusion models of 2 to 4 bits, n - 1 bits and the sign of what they leave for
channels with outliers, and starts the low-rank terms that it trains with the SVD of what rounding lost. Here both are
made for all units, by rounding to nearest: integers in groups of 64 with the sign of the residual, a step in 16 bits
for each group, and a bit for each row that says whether it has one; or with vectors of 16 bits. The error is that of
the weights, squared and relative; KL from the original in nats on 3 windows of 256 tokens per text.

| stored | bits per weight | error | known KL | novel KL |
|---|---:|---:|---:|---:|
{lines}

{claim}

A branch has the levels of one more bit at places that are no better, and a second step to store. Low-rank terms cost
more bytes than the error that they remove is worth: 2 bits with rank 16 take more than 3 bits and lose more. Neither is
a member of moqa's methods or encodings; low-rank terms are not trained here, nor is a diffusion model.
"""


if __name__ == "__main__":
    main()
