"""What the kernels' 8-bit activations cost on the reference model: perplexity through them and through the reference.

Writes runs/bench/accuracy.json. The checkpoint is the main job's (`make demo`), or made here by rounding.
"""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

import moqa
from moqa.format.reader import is_checkpoint

ROOT = Path(__file__).parents[1]
MODEL, TEXT, RUNS = ROOT / "reference" / "model", ROOT / "reference" / "text", ROOT / "runs"
NAMES = ("wiki", "novels", "python", "math", "german", "french")


def checkpoint() -> Path:
    made, demo = RUNS / "bench" / "reference-3", RUNS / "demo" / "checkpoint"
    if is_checkpoint(demo):
        return demo
    if not is_checkpoint(made):
        known = {name: str(TEXT / f"{name}.calib.txt") for name in NAMES[:2]}
        profile = moqa.profile(MODEL, known, RUNS / "bench" / "reference-profile", samples=16, method="rtn")
        moqa.quantize(MODEL, moqa.plan(profile, "3bpw"), made, method="rtn")
    return made


def main() -> None:
    held_out = {name: str(TEXT / f"{name}.test.txt") for name in NAMES}
    found = {
        kernels: moqa.evaluate(checkpoint(), held_out, against=MODEL, kernels=kernels).distributions
        for kernels in ("reference", "native")
    }
    rows = [
        {
            "distribution": name,
            "tokens": slow.tokens,
            "perplexity_reference": slow.perplexity,
            "perplexity_native": fast.perplexity,
            "perplexity_change_percent": (fast.perplexity / slow.perplexity - 1) * 100,
            "kl_reference": slow.kl_divergence,
            "kl_native": fast.kl_divergence,
        }
        for (name, slow), fast in zip(found["reference"].items(), found["native"].values(), strict=True)
    ]
    path = RUNS / "bench" / "accuracy.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    table = Table(title="reference model at 3 bits: native kernels beside the reference")
    for name in ("distribution", "perplexity, reference", "native", "change", "KL, reference", "native"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["distribution"], f"{row['perplexity_reference']:.4f}", f"{row['perplexity_native']:.4f}",
            f"{row['perplexity_change_percent']:+.3f} %", f"{row['kl_reference']:.5f}", f"{row['kl_native']:.5f}",
        )  # fmt: skip
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
