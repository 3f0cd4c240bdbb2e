"""Speed of a whole model in moqa, in transformers in bfloat16, and in llama.cpp in F16, Q4_K and Q2_K.

moqa's checkpoints have 4 bits, mixed 2.5 bits, and 2 bits of a trellis. Writes runs/bench/model.json. The model is the
random one of random_model.py; engines take turns, each in a process of its own, and of a few turns the median counts.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import gguf_engine
import random_model
from rich.console import Console
from rich.table import Table

import moqa

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "bench"
MODEL = RUNS / "random-model"
TEXT = ROOT / "reference" / "text" / "wiki.calib.txt"
PROMPT, NEW, TURNS = 128, 64, 3
# widths do not matter to what a plan is for here: a mix of all of them, at random
PLANS: dict[str, dict[str, Any]] = {
    "4": {"strategy": "uniform", "widths": (4,)},
    "mixed-2.5": {"strategy": "random", "widths": (1, 2, 3, 4)},
    "trellis-2": {"strategy": "uniform", "widths": (2,), "encodings": ("trellis",)},
}


def checkpoints() -> dict[str, Path]:
    """The random model at both sizes."""
    random_model.make(MODEL)
    folders = {weights: RUNS / f"moqa-{weights}" for weights in PLANS}
    if not all(folder.exists() for folder in folders.values()):
        profile = moqa.profile(
            MODEL, {"wiki": str(TEXT)}, RUNS / "profile", context=32, samples=2, self_samples=1, method="rtn"
        )
        for weights, options in PLANS.items():
            budget = "2.5bpw" if options["strategy"] == "random" else None
            moqa.quantize(MODEL, moqa.plan(profile, budget, **options), folders[weights], method="rtn", overwrite=True)
    return folders


def measure(engine: str, weights: str, path: Path, threads: int) -> dict:
    if engine == "llama.cpp":
        found = gguf_engine.measure(path, threads, PROMPT, NEW, repeats=3, repack="repacked" in weights)
    else:
        found = moqa.bench(path, threads=threads, prompt_tokens=PROMPT, new_tokens=NEW, repeats=3).model_dump()
    kept = (
        "bytes", "decode_tokens_per_second", "prefill_tokens_per_second", "load_seconds", "peak_bytes",
    )  # fmt: skip
    return {"engine": engine, "weights": weights, "threads": threads} | {key: found[key] for key in kept}


def show(rows: list[dict]) -> None:
    for threads in sorted({row["threads"] for row in rows}):
        table = Table(title=f"{threads} threads: prompt {PROMPT}, then {NEW} tokens")
        for name in ("engine", "weights", "MB", "decode tok/s", "prefill tok/s", "load s", "peak MB"):
            table.add_column(name, justify="right")
        for row in (row for row in rows if row["threads"] == threads):
            table.add_row(
                row["engine"], row["weights"], f"{row['bytes'] / 1e6:.0f}", f"{row['decode_tokens_per_second']:.0f}",
                f"{row['prefill_tokens_per_second']:.0f}", f"{row['load_seconds']:.2f}",
                f"{row['peak_bytes'] / 1e6:.0f}",
            )  # fmt: skip
        Console(width=100).print(table)


def main() -> None:
    contenders = [("moqa", weights, folder) for weights, folder in checkpoints().items()]
    contenders.append(("transformers", "bf16", MODEL))
    contenders.append(("llama.cpp", "F16", gguf_engine.prepare(MODEL, "F16")))
    for kind in ("Q4_K", "Q2_K"):
        path = gguf_engine.prepare(MODEL, kind)
        # which of the two is faster differs between decoding and prefill
        contenders += [("llama.cpp", kind, path), ("llama.cpp", f"{kind} repacked", path)]
    rows = []
    for threads in (1, 2):
        turns: list[list[dict]] = []
        for turn in range(TURNS):
            print(f"moqa: engines on {threads} threads, turn {turn + 1} of {TURNS}", file=sys.stderr, flush=True)
            turns.append([measure(*contender, threads) for contender in contenders])
        for found in zip(*turns, strict=True):
            numbers = {key: value for key, value in found[0].items() if isinstance(value, float)}
            rows.append(found[0] | {key: statistics.median(turn[key] for turn in found) for key in numbers})
    (RUNS / "model.json").write_text(json.dumps(rows, indent=1) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
