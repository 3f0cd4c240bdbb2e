"""What training after quantization gains: default and uniform plans with and without it, on the reference model.

Writes runs/trained/summary.json and docs/results/recover.md; rows that are there are kept, so that a run that was
stopped goes on. Each pair of rows has the same plan, profile and bytes.
"""

import argparse
import json
import resource
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from textwrap import fill

from claims import claim, table_of
from demo import KNOWN, MODEL, NOVEL, texts
from trained_rows import RUNS, add
from trained_rows import known as known_of

import moqa
from moqa.errors import LittleMemoryError
from moqa.memory.limit import MemoryLimit
from moqa.models.view import open_model
from moqa.profiling import Profile, read_profile
from moqa.training import trains_whole

ROOT = Path(__file__).parents[1]
LARGE, PAGE = RUNS / "blockwise.json", ROOT / "docs" / "results" / "recover.md"
# those of recovery alone, and three of llama.cpp's that plans without it do not beat by as much as wanted
SIZES = (2.56, 1.78, 1.97, 3.21, 2.1, 2.3, 3.06, 3.44)
# two of them would have the same uniform plan
UNIFORM_SIZES = (2.56, 3.44)
STEPS = 150
SAMPLES, FEWER = 256, 64
FEW = f"default, {FEWER} samples"
# steps of each block, where one block after the other is trained
BLOCK_STEPS, BY_BLOCKS = 50, ", block by block"
# how much lower known and novel divergences should be, by whether the plan has more bits than these
LOW_BITS, WANTED = 2.6, {False: (0.5, 0.35), True: (0.35, 0.2)}
# known and novel KL over llama.cpp's best: of plans, by whether they have 3 bits, and of trained plans of so many bits
BESIDE, TRAINED, TRAINED_FROM = {False: (0.35, 0.6), True: (0.25, 0.45)}, (1 / 5, 1 / 3), 2.05
LOW_BITS_PAGE = ROOT / "docs" / "results" / "low-bits.md"
KINDS = {"default": {}, "uniform": {"strategy": "uniform", "encodings": ("int",), "floors": {}}}


def main() -> None:
    """Measure what is not measured yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--windows", type=int, default=64, help="held-out windows of 256 tokens per text")
    options = parser.parse_args()
    for seed in options.seeds:
        pairs = ((kind, bits) for bits in SIZES for kind in KINDS if kind != "uniform" or bits in UNIFORM_SIZES)
        for kind, bits in pairs:
            if len(known(seed=seed, kind=kind, budget=bits)) < 2:
                add(rows(kind, bits, seed, options.windows))
            if bits == SIZES[0] and not known(seed=seed, kind=kind + BY_BLOCKS):
                add(rows(kind + BY_BLOCKS, bits, seed, options.windows, lengths=(0, BLOCK_STEPS))[1:])
            write_page()
        if not known(seed=seed, kind=FEW):
            add(rows(FEW, SIZES[0], seed, options.windows, lengths=(0,)))
        write_page()


def known(**wanted: object) -> list[dict]:
    """Rows with some values."""
    return known_of("recover", **wanted)


@cache
def profile_of(seed: int, samples: int) -> Profile:
    """The profile of the known texts whose windows are drawn with a seed."""
    folder = RUNS / (f"profile-{seed}" if samples == SAMPLES else f"profile-{seed}-{samples}")
    if not (folder / "profile.json").exists():
        moqa.profile(MODEL, texts("calib", KNOWN), folder, samples=samples, seed=seed)
    return read_profile(folder)


def rows(kind: str, bits: float, seed: int, windows: int, lengths: tuple[int, ...] = (0, STEPS)) -> list[dict]:
    """A plan without training and with it."""
    measured, out, found = profile_of(seed, FEWER if kind == FEW else SAMPLES), RUNS / "out", list[dict]()
    plan = moqa.plan(measured, f"{bits}bpw", **KINDS.get(kind.removesuffix(BY_BLOCKS), {}))
    for steps in lengths:
        began = time.perf_counter()
        if steps:
            moqa.recover(
                out, out, length=str(steps), profile=measured, model=MODEL, overwrite=True, restart=True, seed=seed,
                memory=one_block() if kind.endswith(BY_BLOCKS) else None,
            )  # fmt: skip
        else:
            moqa.quantize(MODEL, plan, out, profile=measured, overwrite=True, restart=True)
        seconds = time.perf_counter() - began
        quality = moqa.evaluate(out, texts("test", (*KNOWN, *NOVEL)), against=MODEL, windows=windows).distributions
        kl = {name: scores.kl_divergence for name, scores in quality.items()}
        found.append({
            "system": "recover", "model": "reference", "kind": kind, "budget": bits, "seed": seed,
            "setting": f"{kind} {bits} bits, {steps} steps", "bits_per_weight": plan.account.bits_per_weight,
            "bytes": plan.account.units, "kl_known": mean(kl[name] for name in KNOWN),
            "kl_novel": mean(kl[name] for name in NOVEL), "accuracy": None, "seconds": round(seconds, 1),
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        })  # fmt: skip
        print(json.dumps(found[-1]), flush=True)
    return found


def one_block() -> MemoryLimit:
    """Memory in which one block of the reference can be trained, and not all of them."""
    try:
        trains_whole(open_model(MODEL, keep=False), MemoryLimit(1))
    except LittleMemoryError as error:
        return MemoryLimit(int(1.05 * error.least))
    raise RuntimeError("a byte is enough")


def write_page() -> None:
    """Write docs/results/recover.md."""
    lines, claims, beside = list[str](), list[str](), list[str]()
    for kind in KINDS:
        for bits in sorted(SIZES):
            pairs = [known(kind=kind, budget=bits, seed=seed) for seed in sorted({row["seed"] for row in known()})]
            pairs = [pair for pair in pairs if pair]
            if not pairs:
                continue
            before, after = (
                {key: mean(pair[which][key] for pair in pairs) for key in ("kl_known", "kl_novel", "seconds")}
                for which in (0, 1)
            )
            change = [after[key] / before[key] - 1 for key in ("kl_known", "kl_novel")]
            lines.append(
                f"| {kind} | {pairs[0][0]['bits_per_weight']:.2f} | {len(pairs)} | "
                f"{before['kl_known']:.4f} / {before['kl_novel']:.4f} | "
                f"{after['kl_known']:.4f} / {after['kl_novel']:.4f} | {change[0]:+.0%} / {change[1]:+.0%} | "
                f"{after['seconds'] / 60:.1f} |"
            )
            if kind == "default":
                stored = pairs[0][0]["bits_per_weight"]
                claims += _lower(stored, change)
                line, more = _beside(stored, after)
                beside.append(line)
                claims += more
    blocks = []
    for kind in KINDS:
        rows = [
            row for one in sorted({row["seed"] for row in known()}) for row in known(kind=kind + BY_BLOCKS, seed=one)
        ]
        if rows:
            whole = [known(kind=kind, budget=SIZES[0], seed=row["seed"])[1] for row in rows]
            blocks += [
                f"| {kind} | {rows[0]['bits_per_weight']:.2f} | {how} | {mean(row['kl_known'] for row in some):.4f} / "
                f"{mean(row['kl_novel'] for row in some):.4f} | {mean(row['seconds'] for row in some) / 60:.1f} |"
                for how, some in ((f"whole, {STEPS} steps", whole), (f"{BLOCK_STEPS} steps of each block", rows))
            ]
    large = json.loads(LARGE.read_text()) if LARGE.exists() else None
    few, many = known(kind=FEW), known(kind="default", budget=SIZES[0])[::2]
    more = [
        f"| {samples} | {mean(row['kl_known'] for row in some):.4f} / {mean(row['kl_novel'] for row in some):.4f} | "
        f"{mean(row['seconds'] for row in some):.0f} |"
        for samples, some in ((FEWER, few), (SAMPLES, many)) if some
    ]  # fmt: skip
    PAGE.write_text(
        _PAGE.format(
            steps=STEPS,
            samples=SAMPLES,
            size=SIZES[0],
            rows="\n".join(lines),
            claims="\n".join(claims),
            beside="\n".join(beside),
            more="\n".join(more),
            blocks="\n".join([*_BLOCKS, *blocks, "", ""]) if blocks else "",
            large="" if large is None else of_large(large),
        )
    )


def _lower(bits: float, change: Sequence[float]) -> list[str]:
    """Claims of how much lower training makes divergences."""
    what = f"default plan of {bits:.2f} bits"
    return [
        claim(-found >= most, f"{what}: {kind} KL lower by {round(-found, 2) + 0.0:.0%}; wanted {most:.0%}")
        for kind, found, most in zip(("known", "novel"), change, WANTED[bits > LOW_BITS], strict=True)
    ]


def _beside(bits: float, after: Mapping[str, float]) -> tuple[str, list[str]]:
    """A trained plan beside llama.cpp's best type that is not larger, by a table of docs/results/low-bits.md."""
    rivals = [row for row in table_of(LOW_BITS_PAGE, "bits") if float(row["bits"]) <= bits + 0.005]
    best = [min(float(row["its known / novel KL"].split(" / ")[at]) for row in rivals) for at in range(2)]
    ratios = [after[key] / least for key, least in zip(("kl_known", "kl_novel"), best, strict=True)]
    line = (
        f"| {bits:.2f} | {best[0]:.4f} / {best[1]:.4f} | {after['kl_known']:.4f} / {after['kl_novel']:.4f} | "
        f"{ratios[0]:.2f} / {ratios[1]:.2f} |"
    )
    limits = [BESIDE[bits >= 3], *([TRAINED] if bits > TRAINED_FROM else [])]
    return line, [
        claim(
            ratio <= most,
            f"trained plan of {bits:.2f} bits: {kind} KL over llama.cpp's best: {ratio:.2f}; wanted {most:.2f}",
        )
        for wanted in limits
        for kind, ratio, most in zip(("known", "novel"), ratios, wanted, strict=True)
    ]


def of_large(found: dict) -> str:
    """What the page says of benchmarks/blockwise.py."""
    peaks, seconds = [peak / 2**30 for peak in found["peak_by_block"]], found["seconds_by_block"]
    values = found | {"first": found["resident_before"] / 2**30, "blocks": len(peaks)}
    for name, some in (("least", min), ("most", max)):
        values |= {f"{name}_seconds": some(seconds), f"{name}_memory": some(peaks)}
    return fill(_LARGE.format(**values), 120) + "\n"


_BLOCKS = ("| plan | bits per weight | trained | known / novel KL | minutes |", "|---|---:|---|---|---:|")

_LARGE = """The random model of 441 M parameters ({blocks} blocks; `python benchmarks/blockwise.py`) does not fit
`--max-memory {limit}` as a whole. {steps} steps of each block on one core took {least_seconds:.0f} to
{most_seconds:.0f} seconds per block; resident were at most {least_memory:.2f} to {most_memory:.2f} GiB in each, and
{first:.2f} GiB before the first. Held-out samples differ by {before:.3f} nats before and {after:.3f} after."""

_PAGE = """# Training after quantization

Made by `make trained-study` (`benchmarks/trained.py`) on the reference model. [`moqa recover`](../commands/recover.md)
trains what a checkpoint stores beside integers and codes, for {steps} steps of 8 windows, on the {samples} windows of
wiki, of novels and of the model's own text that the profile holds; known is held-out text of wiki and novels, novel is
python, math, german and french. Every pair has the same plan and the same bytes. KL divergence from the original in
nats; minutes on one core, of a machine that did other things, too. Where held-out samples gain nothing, nothing is
kept.

| plan | bits per weight | seeds | known / novel KL | trained | change | minutes |
|---|---:|---:|---|---|---|---:|
{rows}

Default plans miss what is wanted: their codes share one scale per row of 256 weights, so there is a tenth of the
numbers to train that integers in groups of 64 have, and gptq has left little to find.

{claims}

## Beside llama.cpp
The best of llama.cpp's types of at most these bits, with importance from the same texts ([low bits](low-bits.md)), and
the trained plans, known / novel.

| bits | llama.cpp | moqa, trained | ratios |
|---:|---|---|---|
{beside}

## Block by block
Where the whole model does not fit the memory, each block is trained to give the original's hidden states.

{blocks}{large}
## More samples
The default plan at {size} bits without training, by the windows of each text that profile and gptq see (`--samples`; 64
is the default), and the seconds that quantizing takes on one core.

| windows | known / novel KL | seconds |
|---:|---|---:|
{more}
"""


if __name__ == "__main__":
    main()
