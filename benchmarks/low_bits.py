"""Quality from 1.4 to 4.3 bits: moqa's default plans at the bytes of llama.cpp's types, on the reference model.

llama.cpp quantizes with its own tool and an importance matrix of the same calibration windows; token embedding and head
keep 16 bits. Its weights are decoded by `gguf` and measured by moqa's evaluator. Writes runs/low-bits/summary.json and
docs/results/low-bits.md.

Then, at 2, 2.5 and 3 bits, each of the parts that the default plan is made of: alone, added to what there was before
all of them (integers in groups of 64, floors of 4 bits, a hedge of 0.3, gptq without gradients at outputs), and all
together.
"""

import argparse
import shutil
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

from demo import MODEL
from gguf_engine import prepare
from llama_types import ATTENTION, llama_row
from low_bits_rows import RUNS, Model, default_plan, measured, profile_of, row

import moqa

TYPES = ("IQ1_M", "IQ2_XXS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_S", "Q3_K_M", "IQ4_XS")
PART_BUDGETS = (2.0, 2.5, 3.0)
EARLIER: dict[str, Any] = {
    "encodings": ("int",), "groups": (64,), "widths": (2, 3, 4, 5, 6, 8), "hedge": 0.3,
    "floors": {"shared": 4, "attention": 4, "mlp": 4},
}  # fmt: skip
# what is changed
PARTS: dict[str, dict[str, Any]] = {
    "before": {},
    "no floors": {"floors": {}},
    "groups of 32 to 256": {"groups": None},
    "table": {"encodings": ("int", "table"), "widths": (1, 2, 3, 4, 5, 6, 8)},
    "trellis": {"encodings": ("int", "trellis"), "widths": (1, 2, 3, 4, 5, 6, 8)},
    "hedge of the size": {"hedge": None},
    "gradients at outputs": {"gradients": True},
    "together without gradients": {"gradients": False},
    "together": {},
}


def main() -> None:
    """Measure what is not measured yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--windows", type=int, default=64, help="held-out windows of 256 tokens per text")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows per known text")
    options = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    model = Model("reference", MODEL, RUNS, options.samples, options.windows)
    for kind, suffix in product(options.types, ("", f" {ATTENTION}")):
        setting = f"{kind}{suffix}"
        theirs = row(model, "llama.cpp", setting, 0, partial(llama_row, model, kind, setting, _original()))
        for seed in options.seeds:
            row(model, "moqa", setting, seed, partial(default_plan, model, theirs["bits_per_weight"], seed))
    for bits, part in product(PART_BUDGETS, PARTS):
        seed = options.seeds[0]
        row(model, "moqa", f"{bits:g} bits, {part}", seed, partial(part_row, model, part, bits, seed))


def part_row(model: Model, part: str, bits: float, seed: int) -> dict:
    """The same with one of the parts alone; without figures if no plan is so small."""
    changes = dict(PARTS[part])
    profile = profile_of(model, seed)
    if not changes.pop("gradients", part.startswith("together")):
        profile = replace(profile, statistics={
            name: {key: table for key, table in tables.items() if ".gradient_" not in key}
            for name, tables in profile.statistics.items()
        })  # fmt: skip
    try:
        plan = moqa.plan(profile, f"{bits}bpw", **({} if part.startswith("together") else EARLIER | changes))
    except moqa.MoqaError as error:
        print(f"{bits:g} bits, {part}: {error}", flush=True)
        return dict.fromkeys(("bytes", "bits_per_weight", "kl_known", "kl_novel", "top1_known"))
    return measured(model, profile, plan)


@cache
def _original() -> Path:
    """The reference model as a GGUF file in bfloat16."""
    copy = RUNS / "reference"
    if not copy.exists():
        shutil.copytree(MODEL, copy)
    return prepare(copy, "BF16")


if __name__ == "__main__":
    main()
