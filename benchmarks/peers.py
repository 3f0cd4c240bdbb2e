"""GPTQ in moqa, llm-compressor and GPTQModel: time, memory and error at equal windows, bits and groups, on one thread.

Every tool goes from the original's folder to a folder of its own, in a process and an environment of its own
(benchmarks/peers/), eight windows at a time. It quantizes every matrix of the decoder layers but the routers, on a
symmetric grid; what is no expert gets 4 bits or more, as in moqa's uniform plans; all else is as the tool does by
default. Results are then decoded and measured on held-out text by the same code. Peak memory has Python, torch and
transformers in it. Tools take turns, since a machine's speed changes from minute to minute, and a tool's fastest turn
counts. Adds to runs/scale/peers.json, in the place of older rows of the same tool, model and bits.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import product
from math import inf
from pathlib import Path

import random_model
import torch
from decoded_error import Original
from demo import MODEL, ROOT, TEXT
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

import moqa
from moqa.data import cut_windows, read_distribution
from moqa.tasks import TASKS
from moqa.tasks.causal_lm import load_tokenizer

RUNS = ROOT / "runs" / "scale"
RESULTS = RUNS / "peers.json"
WORKER = Path(__file__).with_name("peers") / "worker.py"
MODELS = {"reference": MODEL, "random-441M": ROOT / "runs" / "bench" / "random-model"}
SAMPLES, HELD_OUT, CONTEXT, GROUP = 64, 32, 256, 64
COLUMNS = (
    "model", "bits", "tool", "seconds", "with start", "of CPU", "peak MB", "KL", "error", "matrices", "MB",
)  # fmt: skip
# row -> its tool and what is special about it
ROWS = {
    "moqa": ("moqa", {}),
    "moqa with its profile": ("moqa", {"profile": "profile"}),  # in the folder of the job, where there is none yet
    "llm-compressor": ("llmcompressor", {"all_experts": True}),  # its default: every expert sees every token
    "llm-compressor, routed": ("llmcompressor", {"all_experts": False}),
    "GPTQModel": ("gptqmodel", {}),
}


def windows(model: Path, split: str, count: int) -> Tensor:
    text = read_distribution(f"wiki={TEXT / f'wiki.{split}.txt'}")
    return cut_windows(text, load_tokenizer(model), CONTEXT, count).inputs


def samples_alone(name: str, tokens: Tensor) -> Path:
    """The least profile that moqa can quantize a uniform plan with: nothing but its windows is used."""
    folder = RUNS / "peers" / f"{name}-samples"
    profile = moqa.profile(
        MODELS[name], {"wiki": TEXT / "wiki.calib.txt"}, folder, samples=SAMPLES, context=CONTEXT, self_samples=0,
        group_size=GROUP, symmetric=True, method="rtn", sensitivity=False,
    )  # fmt: skip
    assert torch.equal(profile.samples("wiki"), tokens)
    return folder


def run(python: str, job: dict, folder: Path, limit: float) -> dict:
    """The worker's report, or why there is none."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(job))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MALLOC_"))}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    command = [Path(python).absolute(), "-P", WORKER, "job.json"]
    started = time.time()
    with (folder / "log").open("w") as log:
        try:
            subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log, check=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {limit:.0f} s"}
        except subprocess.CalledProcessError:
            return {"failed": (folder / "log").read_text().strip().splitlines()[-1]}
    report = json.loads((folder / "report.json").read_text())
    return report | {"seconds_with_start": report.pop("finished") - started}


def keep(row: dict) -> list[dict]:
    """All rows so far, this one in the place of an older one of its kind."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    by_kind = {(old["model"], old["bits"], old["tool"]): old for old in [*rows, row]}
    order = [(model, bits, tool) for model in MODELS for bits in range(8, 0, -1) for tool in ROWS]
    rows = [by_kind[kind] for kind in order if kind in by_kind]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def show(rows: list[dict]) -> None:
    table = Table(title=f"{SAMPLES} windows of {CONTEXT} tokens, symmetric groups of {GROUP}, one thread")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("model", "tool") else "right")
    for row in rows:
        if "failed" in row:
            table.add_row(row["model"], str(row["bits"]), row["tool"], row["failed"])
            continue
        same = [r for r in rows if (r["model"], r["bits"]) == (row["model"], row["bits"]) and "failed" not in r]
        ours = next((r for r in same if r["tool"] == "moqa"), row)

        def cell(key: str, form: str, unit: float = 1, row: dict = row, ours: dict = ours) -> str:
            return f"{row[key] / unit:{form}} ({row[key] / ours[key]:.2f}x)"

        table.add_row(
            row["model"], str(row["bits"]), f"{row['tool']} {row['version']}", cell("seconds", ".1f"),
            cell("seconds_with_start", ".1f"), cell("cpu_seconds", ".1f"), cell("peak_bytes", ".0f", 1e6),
            cell("kl", ".5f"), f"{row['layer_errors'][-1]:.2e}", f"{row['matrices']} of {row['matrices_of_model']}",
            f"{row['bytes'] / 1e6:.1f}",
        )  # fmt: skip
    Console(width=170).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llmcompressor", metavar="PYTHON", help="an interpreter that has llm-compressor")
    parser.add_argument("--gptqmodel", metavar="PYTHON", help="an interpreter that has GPTQModel")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    parser.add_argument("--tools", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--turns", type=int, default=3, help="runs of each tool; the fastest counts")
    parser.add_argument("--limit", type=float, default=7200, help="seconds after which a run is given up")
    options = parser.parse_args()
    pythons = {"moqa": sys.executable, "llmcompressor": options.llmcompressor, "gptqmodel": options.gptqmodel}
    tools = [name for name in options.tools if pythons[ROWS[name][0]]]
    torch.set_num_threads(1)
    rows: list[dict] = []
    for name in options.models:
        model = MODELS[name]
        if model != MODEL:
            random_model.make(model)
        tokens = windows(model, "calib", SAMPLES)
        profile = samples_alone(name, tokens)
        original = Original(model, windows(model, "test", HELD_OUT))
        for bits in options.bits:
            job = {
                "model": str(model), "out": "out", "bits": bits,
                "attention_bits": max(bits, 4),
                "group_size": GROUP, "windows": tokens.tolist(), "batch": TASKS["causal_lm"].batch_size // CONTEXT,
                "text": str(TEXT / "wiki.calib.txt"), "profile": str(profile),
            }  # fmt: skip
            fastest: dict[str, dict] = {}
            for turn, row in product(range(options.turns), tools):
                print(f"{name}, {bits} bits, turn {turn + 1}: {row}", file=sys.stderr, flush=True)
                tool, special = ROWS[row]
                folder = RUNS / "peers" / f"{name}-{bits}-{row.replace(', ', '-').replace(' ', '-')}"
                found = run(pythons[tool], job | {"tool": tool} | special, folder, options.limit)
                if "failed" not in found:
                    found |= original.compare(load_file(folder / "dense"), bits, GROUP)
                    (folder / "dense").unlink()
                kind = {"tool": row, "model": name, "bits": bits, "group_size": GROUP, "symmetric": True}
                found = kind | {"turns": options.turns} | found
                # one that failed is slower than any
                fastest[row] = min(fastest.get(row, found), found, key=lambda run: run.get("seconds", inf))
                rows = keep(fastest[row])
    show(rows)


if __name__ == "__main__":
    main()
