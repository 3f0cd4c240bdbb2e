"""Speed of two versions of moqa side by side: the same commands on the reference model, in turns, as ratios.

    benchmarks/two_versions.py ../before/.venv/bin/moqa .venv/bin/moqa

Prints a table: medians of the first and the second version, and the median of the ratios of neighbouring runs.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
MODEL, TEXTS = ROOT / "reference" / "model", ROOT / "reference" / "text"
DATA = ["--data", f"wiki={TEXTS / 'wiki.calib.txt'}", "--samples", "32", "--context", "128"]
HELD_OUT = ["--data", f"wiki={TEXTS / 'wiki.test.txt'}", "--windows", "32", "--context", "128"]


def measure(moqa: str, folder: Path) -> dict[str, float]:
    """What one version takes: seconds of commands, tokens per second of the packed model."""

    def run(*typed: object) -> float:
        start = time.perf_counter()
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        subprocess.run([moqa, *map(str, typed)], cwd=folder, env=environment, check=True, capture_output=True)
        return time.perf_counter() - start

    found = {"profile, s": run("profile", MODEL, *DATA, "-o", "profile")}
    run("plan", "profile", "--bpw", 3, "-o", "plan.json")
    found["quantize with gptq, s"] = run("quantize", MODEL, "--plan", "plan.json", "-o", "out")
    found["evaluate, s"] = run("evaluate", "out", *HELD_OUT, "--against", MODEL)
    run("bench", "out", "--prompt-tokens", 256, "--new-tokens", 128, "--repeats", 7, "--json", "bench.json")
    speeds = json.loads((folder / "bench.json").read_text())
    found |= {f"{name}, tokens/s": speeds[f"{name}_tokens_per_second"] for name in ("prefill", "decode")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="moqa command of one version")
    parser.add_argument("after", help="moqa command of the other")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    pairs = []
    for _ in range(options.repeats):
        both = []
        for moqa in (options.before, options.after):
            with tempfile.TemporaryDirectory() as folder:
                both.append(measure(str(Path(moqa).absolute()), Path(folder)))
        pairs.append(both)
    print("| | before | after | after / before |\n|---|---:|---:|---:|")
    for name in pairs[0][0]:
        before, after = (median(pair[side][name] for pair in pairs) for side in (0, 1))
        ratio = median(pair[1][name] / pair[0][name] for pair in pairs)
        print(f"| {name} | {before:.1f} | {after:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
