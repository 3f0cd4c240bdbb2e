"""Hostile checkpoints, over a thousand: each is refused in one line, or computes exactly what the sound one does.

Every seed is one mutation, the same on every run: `python tests/test_fuzz.py show SOUND SEED` leaves its folder behind.
They run in processes of their own, so that a crash or a hang is seen and its seed known.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hostile.cases import run, show
from hostile.victim import TRANSFORMERS, UNVERIFIED, VERIFIED

SEEDS, BATCHES = 1200, 2
CONFIG_SEEDS = 150
SAMPLE = 50  # of from_pretrained
BATCH_SECONDS = 1800  # what takes as long hangs, on any machine


@pytest.fixture(scope="module")
def sound(tiny_model, texts, tmp_path_factory) -> Path:
    """The tiny model quantized with every width and every encoding somewhere."""
    from moqa.format.scheme import Scheme
    from moqa.planning import Budget, plan
    from moqa.planning.account import account_of
    from moqa.profiling import profile
    from moqa.quantization import quantize

    folder = tmp_path_factory.mktemp("fuzz")
    profiled = profile(tiny_model, [texts["wiki"]], folder / "profile", samples=2, context=16, self_samples=0)
    widths = (1, 2, 3, 4, 5, 6, 7, 8, 16)
    planned = plan(profiled, Budget.parse(bpw=9), strategy="random", widths=widths, seed=1)
    assert {scheme.width for scheme in planned.units.values()} == set(widths)
    units = dict(planned.units)
    for encoding, width in (("trellis", 2), ("trellis", 3), ("table", 4)):
        name = next(name for name, scheme in units.items() if scheme == Scheme(width=width))
        units[name] = Scheme(width=width, encoding=encoding)
    planned = planned.model_copy(update={"units": units, "account": account_of(profiled, units)})
    return quantize(tiny_model, planned, folder / "sound", method="rtn", profile=profiled)


def check(sound: Path, names: list[str], seeds: list[str]) -> Counter:
    """Run seeds in a process of their own; what came of them, by loader."""
    command = [sys.executable, __file__, "run", str(sound), ",".join(names), *seeds]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            code = subprocess.run(command, stdout=out, stderr=err, env=environment, timeout=BATCH_SECONDS).returncode
        except subprocess.TimeoutExpired:
            code = f"no end after {BATCH_SECONDS} s"
        lines, errors = (file.seek(0) or file.read().splitlines() for file in (out, err))
    seed, wrong = "start", []
    for line in lines:
        if line.startswith("seed "):
            seed = line
        elif line.startswith("WRONG "):
            wrong.append(f"{seed}: {line.removeprefix('WRONG ')}")
    if code != 0:
        wrong.append(f"{seed} was the last of the process (exit {code}), which said\n" + "\n".join(errors[-40:]))
    if wrong:
        pytest.fail(f"{len(wrong)} are wrong:\n" + "\n".join(wrong), pytrace=False)
    return Counter(json.loads(lines[-1].removeprefix("seen ")))


@pytest.mark.parametrize("batch", [0, *(pytest.param(batch, marks=pytest.mark.slow) for batch in range(1, BATCHES))])
def test_hostile_checkpoints_are_refused_or_harmless(sound, batch):
    seeds = [f"any:{number}" for number in range(SEEDS) if number % BATCHES == batch]
    seen = check(sound, [VERIFIED, UNVERIFIED], seeds)
    # most must be refused, and some must not: a reader that refuses all would pass otherwise
    assert seen["verified refused"] > 0.6 * len(seeds)
    assert seen["unverified loaded"] > seen["verified loaded"] > 0.05 * len(seeds)


def test_a_configuration_that_is_not_the_weights(sound):
    seen = check(sound, [VERIFIED, UNVERIFIED], [f"config:{number}" for number in range(CONFIG_SEEDS)])
    assert seen["verified refused"] > 0.3 * CONFIG_SEEDS


def test_transformers_own_loader_gives_no_wrong_logits(sound):
    seeds = [f"any:{number}" for number in range(SEEDS, SEEDS + SAMPLE)]
    seen = check(sound, [TRANSFORMERS], seeds)
    assert seen["transformers refused"] > 0.5 * len(seeds)


if __name__ == "__main__":
    _, command, sound_folder, *rest = sys.argv
    if command == "show":
        show(Path(sound_folder), rest[0])
    else:
        run(Path(sound_folder), rest[0].split(","), rest[1:])
