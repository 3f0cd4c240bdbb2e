"""How long adjustments take: on the reference model, and by layer on a random one of OLMoE's shape.

Needs the checkpoints of benchmarks/adjust_study.py. Writes runs/adjust/speed.json and docs/results/adjust-speed.md.
"""

import json
import shutil
import statistics
import time
from pathlib import Path

import torch
from demo import MODEL, NOVEL, ROOT, texts
from transformers import OlmoeConfig, OlmoeForCausalLM

import moqa
from moqa.format.adjustment import read_adjustment
from moqa.format.reader import open_checkpoint

RUNS = ROOT / "runs" / "adjust"
PAGE = ROOT / "docs" / "results" / "adjust-speed.md"
OUT = RUNS / "timed"
LAYERS = (1,)  # 20 GB of memory: the sums of squares of 64 experts' inputs


def olmoe(layers: int) -> Path:
    """A checkpoint of a random model with layers of OLMoE-1B-7B: 64 experts, top 8, hidden 2048, width 1024."""
    folder = RUNS / f"olmoe-{layers}"
    if not (folder / "out" / "moqa.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        torch.manual_seed(0)
        config = OlmoeConfig(
            vocab_size=8192, hidden_size=2048, intermediate_size=1024, num_hidden_layers=layers, num_experts=64,
            num_experts_per_tok=8, num_attention_heads=16, num_key_value_heads=16, pad_token_id=0, eos_token_id=0,
            bos_token_id=None,
        )  # fmt: skip
        OlmoeForCausalLM(config).bfloat16().save_pretrained(folder / "model")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(MODEL / name, folder / "model" / name)
        profile = moqa.profile(
            folder / "model", texts("calib", ("wiki",)), folder / "profile", samples=2, context=64, self_samples=0,
            method="rtn",
        )  # fmt: skip
        plan = moqa.plan(profile, None, strategy="uniform", widths=[3])
        moqa.quantize(folder / "model", plan, folder / "out", method="rtn", profile=profile, cache="full")
    return folder / "out"


def timed(checkpoint: Path, novel: str) -> dict[str, float]:
    """Seconds of the search, and milliseconds of what happens to a loaded model."""
    made = moqa.adjust(checkpoint, texts("calib", (novel,)), OUT, overwrite=True)
    model, _ = moqa.load(checkpoint, verify=False)
    found: dict[str, list[float]] = {}

    def lap(name: str, started: float) -> None:
        found.setdefault(name, []).append(1000 * (time.perf_counter() - started))

    for _ in range(5):
        started = time.perf_counter()
        model.apply(OUT)
        lap("apply", started)
        started = time.perf_counter()
        model.revert()
        lap("revert", started)
        started = time.perf_counter()
        model.adjustments.switch(novel)
        lap("switch", started)
        model.adjustments.switch(None)
        model.adjustments.drop(novel)
    started = time.perf_counter()
    read_adjustment(OUT)
    read = 1000 * (time.perf_counter() - started)
    return {"search_seconds": made.search_seconds, "read_milliseconds": read} | {
        f"{name}_milliseconds": statistics.median(values) for name, values in found.items()
    }


def row(name: str, checkpoint: Path, found: dict[str, float], layers: int) -> str:
    size = open_checkpoint(checkpoint, verify=False).bytes
    return (
        f"| {name} | {layers} | {size / 2**20:.0f} | {found['search_seconds']:.1f} | "
        f"{found['search_seconds'] / layers:.1f} | {found['apply_milliseconds']:.1f} | "
        f"{found['read_milliseconds']:.1f} | {1000 * found['switch_milliseconds']:.0f} | "
        f"{1000 * found['revert_milliseconds']:.0f} |"
    )


def main() -> None:
    reference = RUNS / "wiki-novels-3-default"
    timed(reference, NOVEL[0])  # what is imported and made once
    results, lines = {}, []
    for novel in NOVEL:
        found = results[novel] = timed(reference, novel)
        lines.append(row(f"reference, {novel}", reference, found, 6))
        print(lines[-1], flush=True)
    for layers in LAYERS:
        checkpoint = olmoe(layers)
        found = results[f"olmoe-{layers}"] = timed(checkpoint, "german")
        lines.append(row("OLMoE-shaped", checkpoint, found, layers))
        print(lines[-1], flush=True)
    (RUNS / "speed.json").write_text(json.dumps(results, indent=1) + "\n")
    table = "\n".join(lines)
    PAGE.write_text(f"""# How long adjustments take

Command: `make adjust-study` (`benchmarks/adjust_speed.py`). 2 CPU cores, 64 windows of 256 tokens, 1 % of the bytes,
mode residual. Search is everything from tokens to the file; applying reads and checks the file, switching exchanges
adjustments that are held.

| model | layers | MiB | search, s | per layer, s | apply, ms | of it reading, ms | switch, us | revert, us |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
{table}

OLMoE-shaped: random layers with 64 experts, top 8, hidden size 2048 and expert width 1024, plainly rounded to 3 bits;
16 of them are OLMoE-1B-7B. The search is compute: two forward passes of a third of the tokens and one of the rest, one
backward pass of a third, and one more forward pass for what residuals are fitted to. So it grows with active parameters
x tokens, and with the number of chosen channels only a little. MoQa reports 13 to 21 ms for a search over a whole 7B to
16B model on a GPU: that is the comparison of significances and the fetch of cached channels, after the samples have run
through the model, and no rounding is fitted.
""")


if __name__ == "__main__":
    main()
