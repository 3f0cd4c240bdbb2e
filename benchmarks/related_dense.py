"""QuantMoE-Bench's question on SmolLM2-135M: the strategies that a dense model can have, at two budgets, one seed.

On one thread a profile and a row take minutes each, and the measured divergence of `exl3` longer: few windows, hours.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from low_bits_rows import RUNS as LOW_BITS
from related_placement import RUNS, Subject, compare
from related_rows import Rows
from second_model import NAME, make

SMOLLM2 = Subject(NAME, LOW_BITS / NAME / "original", 16, 4, ((2.5,), (3.0,)))
SEEDS = (0,)


def study(rows: Rows, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """Of the seeds that are asked for, those of `SEEDS`."""
    seeds = tuple(seed for seed in seeds if seed in SEEDS)
    if seeds and not (SMOLLM2.folder / "model.safetensors").exists():
        SMOLLM2.folder.parent.mkdir(parents=True, exist_ok=True)
        make(SMOLLM2.folder)
    return compare(rows, SMOLLM2, seeds)


if __name__ == "__main__":
    study(Rows(RUNS / "rows"), SEEDS)
