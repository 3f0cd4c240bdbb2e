"""Every job, killed at every call that changes the disk, then damaged; see `hostile/kills.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "hostile" / "kills.py"
JOBS = (
    "quantize-gptq", "quantize-rtn", "quantize-again", "profile", "profile-more", "compress", "adjust", "adjust-again",
    "plan", "report",
)  # fmt: skip
# distance of moments where each file of the unfinished work is damaged, too
DAMAGES = {"none": 1, "power": 1, "flip": 20, "cut": 20}
SAMPLE = (
    "quantize-gptq:none:47", "quantize-gptq:power:49", "quantize-rtn:none:59", "quantize-again:none:37",
    "quantize-again:power:41", "profile-more:power:97", "compress:none:53", "adjust:none:29", "plan:none:2",
    "plan:power:2", "report:none:2",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kills")


def kill(folder, *typed):
    """For each job how often each outcome came; fails on any but `harmless` and `found`."""
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, *typed], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert not [line for line in lines if line.startswith("WRONG")]
    seen = [json.loads(line) for line in lines]
    assert all(counts.keys() <= {"harmless", "found"} for counts in seen)
    return seen


def test_the_same_job_goes_on_after_a_kill_or_a_loss_of_power(folder):
    assert all(counts["harmless"] > 1 for counts in kill(folder, *SAMPLE))


def test_damaged_work_is_found_or_does_not_matter(folder):
    [counts] = kill(folder, "quantize-gptq:flip:120")
    assert counts["found"] > counts["harmless"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("job", JOBS)
def test_every_moment(job, damage, folder):
    kill(folder, f"{job}:{damage}:{DAMAGES[damage]}")
