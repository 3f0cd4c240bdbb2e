"""What a dry run foretells beside what the run then takes: seconds and memory, each pair measured back to back.

Three runs: the reference model with gptq at 3 bits from a plan, the same from texts in one command, and a random dense
model of 135M parameters from a plan. Writes runs/forecast/summary.json and docs/results/forecast.md.

    benchmarks/forecast_accuracy.py [REPEATS] [NAME ...]
"""

import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from demo import MODEL as REFERENCE
from demo import ROOT, TEXT
from transformers import AutoModelForCausalLM, LlamaConfig

RUNS = ROOT / "runs" / "forecast"
SUMMARY, PAGE = RUNS / "summary.json", ROOT / "docs" / "results" / "forecast.md"
BITS, SAMPLES, FEW = "3", "64", "16"
MOQA = (sys.executable, "-m", "moqa")
# a dry run whose clock is the time that its own cores work: on a machine that others use, too, it differs less
WORKED = "import time; time.perf_counter = time.process_time; from moqa.cli.main import main; main()"
# runs a command and says how many KiB of it were resident at most, and how many seconds cores worked for it
USED = (
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
    "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_maxrss, used.ru_utime + used.ru_stime)"
)
WIKI = f"wiki={TEXT / 'wiki.calib.txt'}"


def dense(folder: Path) -> Path:
    """A random dense model of 135M parameters (30 layers, hidden size 576) that is in no way like the reference."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=576, num_hidden_layers=30, intermediate_size=1536, num_attention_heads=9,
            num_key_value_heads=3, vocab_size=49152, max_position_embeddings=2048, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        for path in REFERENCE.glob("tokenizer*.json"):
            shutil.copy(path, folder)
    return folder


def planned(name: str, model: Path, samples: str) -> list[str]:
    """Arguments of quantizing by a plan, which is made first if it is not there."""
    profile, plan = RUNS / f"{name}.profile", RUNS / f"{name}.plan.json"
    if not plan.exists():
        run(
            "profile",
            model,
            "--data",
            WIKI,
            "--samples",
            samples,
            "--self-samples",
            0,
            "--no-sensitivity",
            "-o",
            profile,
        )
        run("plan", profile, "--strategy", "uniform", "--widths", BITS, "-o", plan)
    return ["quantize", str(model), "--plan", str(plan), "--profile", str(profile)]


def run(*arguments: object) -> None:
    """Run a command of moqa."""
    subprocess.run([*MOQA, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def commands() -> dict[str, list[str]]:
    """Arguments of each run, without where it writes."""
    model = dense(RUNS / "dense-135M")
    return {
        "reference from a plan": planned("reference", REFERENCE, SAMPLES),
        "reference in one command": ["quantize", str(REFERENCE), "--data", WIKI, "--bpw", BITS, "--samples", FEW],
        "dense 135M from a plan": planned("dense-135M", model, FEW),
    }


def told(how: Sequence[str], command: Sequence[str]) -> dict[str, float]:
    """What a dry run foretells."""
    said = RUNS / "dry.json"
    subprocess.run(
        [sys.executable, *how, *command, "-o", str(RUNS / "out"), "--dry-run", "--json", str(said)], check=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return json.loads(said.read_text())


def pair(command: list[str]) -> dict[str, dict[str, float]]:
    """What dry runs foretell of a run, and what it takes."""
    for left in (*RUNS.glob("out*"), *RUNS.glob(".out*")):
        shutil.rmtree(left)
    worked = told(["-c", WORKED], command)["seconds"]
    began = time.perf_counter()
    foretold = told(["-m", "moqa"], command)
    between = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", USED, *MOQA, *command, "-o", str(RUNS / "out")], check=True, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    took, (resident, used) = time.perf_counter() - between, map(float, done.stdout.split())
    return {
        "foretold": {key: foretold[key] for key in ("seconds", "peak_bytes")} | {"worked": worked},
        "measured": {"seconds": took, "peak_bytes": resident * 1024, "worked": used},
        "dry run": {"seconds": between - began},
    }


def page(summary: dict[str, list[dict]]) -> str:
    """The table of all pairs, with the middle ratio of each run and the range of all."""
    lines = [
        "# Forecasts beside what they foretell", "",
        f"Made by `python benchmarks/forecast_accuracy.py` on {processor()}, {torch.get_num_threads()} threads; "
        "dry run and run one after the other. The second time is that of the process's own cores, foretold by a dry "
        "run whose clock counts only these: it does not depend on what else the machine does.", "",
        "| run | pairs | dry run, s | time foretold / measured, s | ratio | core time foretold / measured, s | ratio | "
        "peak foretold / measured, GiB | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, pairs in summary.items():
        cells = [name, str(len(pairs)), f"{median(pair['dry run']['seconds'] for pair in pairs):.0f}"]
        for key, size in (("seconds", 1), ("worked", 1), ("peak_bytes", 2**30)):
            foretold, measured = (median(pair[of][key] for pair in pairs) / size for of in ("foretold", "measured"))
            ratios = sorted(pair["foretold"][key] / pair["measured"][key] for pair in pairs)
            digits = 2 if key == "peak_bytes" else 0
            cells.append(f"{foretold:.{digits}f} / {measured:.{digits}f}")
            cells.append(f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def processor() -> str:
    """Its name, as the system says it."""
    said = Path("/proc/cpuinfo").read_text().split("model name")
    return said[1].split("\n")[0].strip("\t :") if len(said) > 1 else platform.machine()


def main() -> None:
    repeats, *names = sys.argv[1:] or ["3"]
    RUNS.mkdir(parents=True, exist_ok=True)
    summary = json.loads(SUMMARY.read_text()) if SUMMARY.exists() else {}
    for name, command in commands().items():
        if names and name not in names:
            continue
        summary[name] = []
        for _ in range(int(repeats)):
            found = pair(command)
            summary[name].append(found)
            print(name, {key: found["foretold"][key] / found["measured"][key] for key in found["measured"]}, flush=True)
        SUMMARY.write_text(json.dumps(summary, indent=1) + "\n")
    PAGE.write_text(page(summary))


if __name__ == "__main__":
    main()
