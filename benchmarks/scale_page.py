"""docs/results/scale.md from what `make scale-study` and `make peers` measured."""

import json
from pathlib import Path

from scale_study import CONTEXT, GIB, OLMOE, RUNS, SUMMARY, WINDOWS, Shape, operations
from speed_page import table

ROOT = Path(__file__).parents[1]
PAGE, PEERS = ROOT / "docs" / "results" / "scale.md", ROOT / "runs" / "scale" / "peers.json"
# layers, hidden, expert width, experts, experts per token, other weights of a layer
MODELS = {
    "Mixtral-8x7B": Shape(32, 4096, 14336, 8, 2, 41_943_040),
    "Qwen3-30B-A3B": Shape(48, 2048, 768, 128, 8, 18_874_368),
    "DeepSeek-V3": Shape(61, 7168, 2048, 256, 8, 187_107_328, 44_040_192),
    "1T (384 experts)": Shape(61, 7168, 2048, 384, 8, 101_711_872, 44_040_192),
}
MACHINES = (1, 8, 64)
# what tasks on other machines do; the rest is done where the run was started
DIVIDED = ("sum experts' inputs", "solve")


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def stage_table(summary: dict) -> str:
    gptq, counted = summary["gptq"], summary["operations"]
    rows = []
    for part, seconds in sorted(gptq["parts"].items(), key=lambda item: -item[1]):
        share = f"{seconds / gptq['seconds']:.0%}"
        if part in counted:
            rate = f"{counted[part]['operations'] / seconds / 1e9:.0f}"
            reached = f"{counted[part]['seconds_at_full_rate'] / seconds:.0%}"
        else:
            rate = reached = "-"
        rows.append([part, f"{seconds:.0f}", share, rate, reached])
    full = sum(part["seconds_at_full_rate"] for part in counted.values())
    rows.append(["all", f"{gptq['seconds']:.0f}", "100%", "", f"{full / gptq['seconds']:.0%}"])
    return table(["part", "s", "of the time", "10^9 operations/s", "of the machine's rate"], rows)


def run_table(summary: dict) -> str:
    rows = []
    for name in ("profile", "gptq", "rtn"):
        found = summary[name]
        peaks = [peak / GIB for peak in found["layer_peaks"]]
        times = [duration(found["seconds"]), f"{found['seconds'] / len(peaks):.1f}"]
        memory = [found["peak_bytes"] / GIB, peaks[1], peaks[-1]]
        growth = f"{peaks[-1] / peaks[1] - 1:+.1%}"
        rows.append([name, *times, *(f"{value:.2f}" for value in memory), growth])
    return table(["stage", "time", "s per layer", "peak GiB", "layer 2", "layer 16", "growth"], rows)


def foretold_table(summary: dict) -> str:
    runs = []
    for name in ("gptq", "rtn"):
        written = sum(path.stat().st_size for path in (RUNS / name).glob("*.safetensors"))
        runs.append((name, summary["dry run"][name], summary[name] | {"checkpoint_bytes": written}))
    for name, run in summary.get("one command", {}).items():
        runs.append((f"one command, {name}", run["foretold"], run["measured"]))
    rows = []
    for name, said, found in runs:
        for what, key, unit, digits in (
            ("checkpoint, bytes", "checkpoint_bytes", 1, 0),
            ("peak, GiB", "peak_bytes", GIB, 2),
            ("time, s", "seconds", 1, 0),
        ):
            if key in found:
                values = [f"{said[key] / unit:.{digits}f}", f"{found[key] / unit:.{digits}f}"]
                rows.append([f"{name}: {what}", *values, f"{said[key] / found[key]:.2f}"])
    return table(["", "foretold", "measured", "ratio"], rows)


def prediction(summary: dict, shape: Shape, machines: int) -> str:
    """Time of gptq on so many machines like this one, at the rates that each part reached."""
    reached = summary["gptq"]["parts"]
    here = summary["operations"]
    there = operations(shape, WINDOWS * CONTEXT, summary["machine"])
    seconds = 0.0
    for part, counts in there.items():
        took = counts["seconds_at_full_rate"] * reached[part] / here[part]["seconds_at_full_rate"]
        seconds += took / machines if part in DIVIDED else took
    # what is left (reading, writing, all else) goes with the bytes
    others = sum(took for part, took in reached.items() if part not in here)
    size = shape.layers * shape.layer * 2
    return duration(seconds + others * size / summary["checkpoint_bytes"])


def prediction_table(summary: dict) -> str:
    rows = []
    for name, shape in MODELS.items():
        size, layer = shape.layers * shape.layer * 2 / 1e9, shape.layer * 2 / GIB
        # the layer, its packed form at 4 bits, one stack of matrices with its copies, Python
        memory = layer * 1.3 + (40 * shape.expert + 32 * shape.hidden**2) / GIB + 1
        rows.append(
            [name, f"{size:.0f}", f"{layer:.1f}", f"{memory:.0f}", *(prediction(summary, shape, n) for n in MACHINES)]
        )
    headings = ["model", "GB", "GiB per layer", "GiB of memory", *(f"{n} machine{'s'[: n > 1]}" for n in MACHINES)]
    return table(headings, rows)


def peers_table(rows: list[dict]) -> str:
    cells = []
    for row in rows:
        if "failed" in row:
            cells.append([row["model"], str(row["bits"]), row["tool"], row["failed"], "", "", "", ""])
            continue
        ours = next(r for r in rows if (r["model"], r["bits"], r["tool"]) == (row["model"], row["bits"], "moqa"))
        cells.append(
            [row["model"], str(row["bits"]), f"{row['tool']} {row['version']}", f"{row['seconds']:.1f}",
             str(row["turns"]), f"{row['seconds'] / ours['seconds']:.1f}x", f"{row['peak_bytes'] / 1e6:.0f}",
             f"{row['kl']:.5f}"]
        )  # fmt: skip
    return table(["model", "bits", "tool", "s", "turns", "of moqa's", "peak MB", "KL"], cells)


def main() -> None:
    summary = json.loads(SUMMARY.read_text())
    machine, threads = summary["machine"], summary["machine"]["threads"]
    rate = summary["checkpoint_bytes"] / summary["rtn"]["seconds"]
    size, tokens = f"{summary['checkpoint_bytes'] / 1e9:.1f} GB", WINDOWS * CONTEXT
    kinds = {"bfloat16": "bfloat16", "sums": "float32", "packed": "packed weights", "factors": "Cholesky"}
    rates = ", ".join(f"{machine[kind] / 1e9:.0f} ({name})" for kind, name in kinds.items())
    disk, memory = f"{machine['disk'] / 1e6:.0f} MB/s", f"{machine['memory'] / 1e9:.0f} GB/s"

    def of_disk(rate: float) -> str:
        return f"{rate / 1e6:.0f} MB/s, {rate / machine['disk']:.0%} of the disk's rate"

    written = sum(path.stat().st_size for path in (RUNS / "rtn").glob("*.safetensors"))
    reached, moved = of_disk(rate), of_disk(rate * (1 + written / summary["checkpoint_bytes"]))
    # the first layer waits for all that comes before it
    layers = summary["rtn"]["layer_seconds"][1:-1]
    layer = OLMOE.layer * 2
    between = of_disk(layer * len(layers) / sum(layers))
    busy = summary["rtn"]["cpu_seconds"] / summary["rtn"]["seconds"] / threads
    text = f"""# Models larger than memory

`make scale-study` (stages) and `make peers` (other tools), on {threads} cores. A random checkpoint of OLMoE-1B-7B's
shape (16 layers of 64 experts, {size} in bfloat16, sharded), {WINDOWS} windows of {CONTEXT} tokens, 3 bits,
`--max-memory 4GiB`. Nothing of the checkpoint is in the system's memory when a stage begins.

{run_table(summary)}

The profile is one without sensitivity, which a uniform plan needs none of. Memory is the largest of what was looked at
every 10 ms; growth compares the last layer with the second.

## Where gptq's time goes

{stage_table(summary)}

The machine's rates, measured in the same run, in 10^9 operations a second: {rates}.
A part's share of them is the time that its operations would take at these rates over the time it took.

## rtn and the disk

The disk reads {disk} (before and after `rtn`, on average), memory {memory}. `rtn` goes through the checkpoint at
{reached}, start and end included; with the {written / 1e9:.1f} GB that it writes meanwhile {moved}.
From layer to layer it is {between}. Its {threads} cores are busy for {busy:.0%} of the time: rounding, looking for
NaN, hashes.

## What the dry run foretells

In {summary["dry run"]["seconds"]:.0f} s for both, from headers and a calibration of this machine. "One command" goes
from texts to a checkpoint that is compared with three others of its size, before there is a profile.

{foretold_table(summary)}

## Other models

Not measured: what the parts above would take at the rates they reached here, for {tokens} calibration tokens; more
tokens take proportionally more, but for solving. A machine is one like this, with {threads} cores; on several, experts
are divided and the layer itself is run where the command was given ([scaling](../scaling.md)).

{prediction_table(summary)}
"""
    if PEERS.exists():
        text += f"""
## Beside other tools

Uniform symmetric groups of 64, the same windows, one thread; seconds from folder to folder without the start of Python.
Tools take turns, and the fastest of each one's counts: the machine's speed changes from minute to minute.
"routed" lets llm-compressor show an expert only the tokens that are routed to it.

{peers_table(json.loads(PEERS.read_text()))}
"""
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
