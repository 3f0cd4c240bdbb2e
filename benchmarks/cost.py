"""Time and peak memory of every command on the reference model, each in a process of its own. Writes
docs/results/cost.md."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from plan_speed import table

ROOT = Path(__file__).parents[1]
MODEL, TEXT = "reference/model", "reference/text"
# run by a fresh interpreter, so that the peak is the command's own
SCRIPT = """
import json, sys, time
from moqa.cli.main import main
started = time.monotonic()
try:
    main()
finally:
    peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
    print(json.dumps([time.monotonic() - started, peak]), file=sys.stderr)
"""


def run(*arguments: str) -> tuple[float, int]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return tuple(json.loads(done.stderr.splitlines()[-1]))


def main() -> None:
    shutil.rmtree(ROOT / "runs" / "cost", ignore_errors=True)
    known = [part for name in ("wiki", "novels") for part in ("--data", f"{name}={TEXT}/{name}.calib.txt")]
    steps = {
        "profile (64 windows of 256 tokens, two texts and own text)": (
            "profile", MODEL, *known, "-o", "runs/cost/profile",
        ),
        "profile again (all reused)": ("profile", MODEL, *known, "-o", "runs/cost/profile"),
        "plan": ("plan", "runs/cost/profile", "--bpw", "3", "-o", "runs/cost/plan.json"),
        "quantize, rtn": (
            "quantize", MODEL, "--plan", "runs/cost/plan.json", "--method", "rtn", "-o", "runs/cost/rtn",
        ),
        "quantize, gptq": ("quantize", MODEL, "--plan", "runs/cost/plan.json", "-o", "runs/cost/gptq"),
        "evaluate, one text": (
            "evaluate", "runs/cost/gptq", "--data", f"wiki={TEXT}/wiki.test.txt", "--against", MODEL,
        ),
        "verify": ("verify", "runs/cost/gptq"),
    }  # fmt: skip
    lines = ["| command | seconds | peak memory |", "|---|---:|---:|"]
    for name, arguments in steps.items():
        seconds, peak = run(*arguments)
        lines.append(f"| {name} | {seconds:.1f} | {peak / 1e9:.2f} GB |")
        print(lines[-1], flush=True)
    page = f"""# Cost

Command: `make results` (`benchmarks/cost.py`), 2 cores, each command in a process of its own; Python, torch and
transformers (about 0.45 GB) are included, their import (about 3 s) is not timed before the first use.

{chr(10).join(lines)}

## Plans of large models
Processor seconds for random profiles, by default options at 3 bits per weight (`python benchmarks/plan_speed.py`):

{table((1_000, 18_432, 100_000))}
"""
    (ROOT / "docs" / "results" / "cost.md").write_text(page)


if __name__ == "__main__":
    main()
