"""Processor seconds of a plan, from a profile on the disk to a plan on the disk, by the number of units:

    benchmarks/plan_speed.py [UNITS ...]

The profile has random sensitivities of a Mixture-of-Experts with about 1,000 units in each layer.
"""

import sys
import tempfile
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch

import moqa
from moqa.format.tiles import WIDTHS
from moqa.planning import for_file, read_plan
from moqa.profiling import Profile, ProfileRecord, UnitRecord, read_profile
from moqa.profiling.record import DistributionRecord, Settings
from moqa.profiling.sensitivity import other_schemes
from moqa.profiling.store import write_profile
from moqa.storage.artifact import write_sealed

EXPERTS, HIDDEN, WIDTH = 332, 2048, 768
SHAPES = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
ATTENTION = {"q_proj": (4096, HIDDEN), "k_proj": (512, HIDDEN), "v_proj": (512, HIDDEN), "o_proj": (HIDDEN, 4096)}


def units(layer: int) -> list[UnitRecord]:
    path = f"model.layers.{layer}"
    attention = [
        UnitRecord(name=f"{path}.self_attn.{name}", layer=layer, role="attention", projection=name, expert=None,
                   shape=shape)
        for name, shape in ATTENTION.items()
    ]  # fmt: skip
    return attention + [
        UnitRecord(name=f"{path}.mlp.experts.{expert}.{name}", layer=layer, role="expert", projection=name,
                   expert=expert, shape=shape)
        for expert in range(EXPERTS) for name, shape in SHAPES.items()
    ]  # fmt: skip


def random_profile(folder: Path, layers: int) -> int:
    """Writes a profile; returns its number of units."""
    random = torch.Generator().manual_seed(0)
    some = tuple(unit for layer in range(layers) for unit in units(layer))
    settings = Settings(context=32, samples=1)
    others, names = other_schemes(settings), ("wiki", "novels", "self")

    def noise(spread: float, columns: int) -> torch.Tensor:
        return (torch.randn(len(some), columns, generator=random) * spread).exp()

    rounding = torch.tensor([0.36, *(4.3**-width for width in WIDTHS[1:])]) * noise(0.03, len(WIDTHS))
    ratios = torch.tensor([(0.6 if s.encoding == "trellis" else 0.9) * (s.group_size / 64) ** 0.1 for s in others])
    statistics = {}
    for name in names:
        tables = {"sensitivity": 1e-6 * rounding * noise(1.5, 1), "samples": torch.zeros(1, 32, dtype=torch.int32)}
        for layer in range(layers):
            tables |= {
                f"layer.{layer}.tokens": torch.ones(EXPERTS, dtype=torch.int64),
                f"layer.{layer}.gate_mass": torch.ones(EXPERTS),
                f"layer.{layer}.channel": torch.ones(EXPERTS, WIDTH),
                f"layer.{layer}.coactivation": torch.ones(EXPERTS, EXPERTS),
            }
        statistics[name] = tables
    record = ProfileRecord(
        moqa=moqa.__version__, model="random", model_type="random", fingerprint="",
        kept={"model.norm.weight": ("bfloat16", (HIDDEN,))}, layers=layers, top_k=8, settings=settings, widths=WIDTHS,
        others=others, units=some,
        distributions={n: DistributionRecord(origin="random", samples=1, tokens=32, fitted=None) for n in names},
    )  # fmt: skip
    weights = {"rounding": rounding, "compared": ratios * noise(0.02, len(others))}
    write_profile(Profile(record, folder, statistics, weights))
    return len(some)


def table(counts: Iterable[int]) -> str:
    """Times a plan of 3 bits per weight for each number of units, in rows of a table."""
    rows = [
        "| units | read the profile | plan | write and read the plan | proven gap |", "|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            made = random_profile(Path(folder, "profile"), max(1, round(count / len(units(0)))))
            times = [time.process_time()]
            profile = read_profile(Path(folder, "profile"))
            times.append(time.process_time())
            plan = moqa.plan(profile, "3bpw")
            times.append(time.process_time())
            out = Path(folder, "plan.json")
            write_sealed(for_file(plan, out), out)
            read_plan(out)
            times.append(time.process_time())
        seconds = " | ".join(f"{end - begin:.1f} s" for begin, end in pairwise(times))
        rows.append(f"| {made:,} | {seconds} | {plan.gap:.0e} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table([int(text) for text in sys.argv[1:]] or [1_000, 100_000]))
