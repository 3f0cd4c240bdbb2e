"""A few hundred of the mutated files of `benchmarks/mutations.py`, which tries 10,000."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hostile import tries
from hostile.artifacts import Artifact
from hostile.tries import BAD, OUTCOMES, REFUSED, run

ROOT = Path(__file__).parents[1]
COUNT = 300


def test_no_mutated_file_crashes_hangs_or_gives_a_wrong_result():
    command = [sys.executable, ROOT / "benchmarks" / "mutations.py", "--count", str(COUNT), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    rows = [line.split("|")[2:-1] for line in done.stdout.splitlines() if line.startswith("| ")]
    counts = dict(zip(OUTCOMES, (sum(map(int, column)) for column in zip(*rows[1:], strict=True)), strict=True))
    assert sum(counts.values()) == COUNT
    # a reader that refuses all would pass otherwise, and one that refuses none
    assert 0.5 * COUNT < counts[REFUSED] < 0.9 * COUNT


@pytest.mark.parametrize("what", ["raw", "wrong", "died", "hung"])
def test_what_is_bad_is_seen(what, tmp_path, monkeypatch):
    def use(folder):
        if folder.parent == tmp_path:
            return torch.zeros(1)
        if what == "raw":
            raise KeyError("x")
        if what == "died":
            os.kill(os.getpid(), signal.SIGKILL)
        while what == "hung":
            pass
        return torch.ones(1)

    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "plan.json").write_text('{"a": {"b": [1, 2]}}')
    monkeypatch.setattr(tries, "artifacts", lambda _: [Artifact("plan", use)])
    monkeypatch.setattr(tries, "TRY_SECONDS", 1)
    done = run(tmp_path, [("plan", seed) for seed in (0, 1)])
    assert len(done) == 2
    assert {outcome for _, outcome, _ in done} <= set(BAD)
    names = {"raw": "raw error", "wrong": "wrong result", "died": "process died", "hung": "hang"}
    assert {outcome for _, outcome, _ in done} == {names[what]}
