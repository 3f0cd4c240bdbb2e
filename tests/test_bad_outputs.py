"""Outputs that cannot be written or go away, disks that are too small, and time that runs out."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from long_work import SMALL, contents, refusal

from moqa.cli.progress.limits import seconds_of, time_limited
from moqa.errors import Stopped
from moqa.forecast.disk import profile_disk_bytes
from moqa.methods import METHODS
from moqa.models.view import open_model
from moqa.planning import STRATEGIES, Budget, plan
from moqa.profiling import profile
from moqa.profiling import run as profiler
from moqa.profiling.blank import blank_profile
from moqa.profiling.record import Settings
from moqa.progress import quiet
from moqa.quantization import checkpoint as written
from moqa.quantization import quantize
from moqa.quantization.run import disk_needed
from moqa.storage import resumable as unfinished
from moqa.storage.resumable import ResumableRun


class TestOutput:
    @pytest.mark.parametrize(
        ("place", "reason"),
        [
            ("file/out", "Not a directory"),
            ("file/a/b", "Not a directory"),
            ("/proc/out", "No such file or directory"),
            ("/proc/self/a/b", "No such file or directory"),
            ("x" * 300, "File name too long"),
            ("x" * 250, "File name too long"),
        ],
    )
    def test_where_nothing_can_be_made(self, place, reason, work, sharded, tmp_path):
        (tmp_path / "file").write_text("")
        out = tmp_path / place
        assert refusal(work, sharded, out) == f"{out} cannot be written: {reason}"
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    @pytest.mark.parametrize("place", ["", ".", "a/.."])
    def test_without_a_name(self, place, work, sharded, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert "is not the name of a new folder" in refusal(work, sharded, Path(place))
        assert list(tmp_path.iterdir()) == []

    def test_on_a_disk_that_is_read_only(self, work, sharded, small_disk):
        small_disk("ro")
        out = small_disk.folder / "out"
        assert refusal(work, sharded, out) == f"{out} cannot be written: Read-only file system"

    def test_that_somebody_removes(self, work, sharded, out):
        partial, heard = out.with_name(".out.partial"), []
        work(sharded, out, lambda *_, **__: heard.append(1))
        shutil.rmtree(out)
        assert len(heard) > 3
        for number in range(1, len(heard) + 1):
            left = iter(range(number - 1, -1, -1))

            def report(*_, left=left, **__):
                if next(left, None) == 0:
                    shutil.rmtree(partial)

            message = refusal(work, sharded, out, report)
            assert message == f"{out} could not be written: somebody removed {partial}: run the same command again"
            assert list(out.parent.iterdir()) == []

    def test_that_somebody_removes_before_its_manifest(self, sharded, sharded_plan, sharded_profile, out, monkeypatch):
        write = written.write_manifest

        def gone(manifest, path):
            shutil.rmtree(out.with_name(".out.partial"))
            write(manifest, path)

        monkeypatch.setattr(written, "write_manifest", gone)
        assert "somebody removed" in refusal(quantize, sharded, sharded_plan, out, profile=sharded_profile)
        assert list(out.parent.iterdir()) == []

    def test_of_which_a_shard_was_removed(self, sharded, sharded_plan, sharded_profile, out):
        def report(_, done, *__, **___):
            if done == 1:
                next(out.with_name(".out.partial").glob("result/model-00001-*")).write_bytes(b"")

        assert "was changed after it was written" in refusal(
            quantize, sharded, sharded_plan, out, profile=sharded_profile, report=report
        )
        assert list(out.parent.iterdir()) == []

    def test_whose_result_was_removed_between_two_runs_begins_anew(self, sharded, sharded_plan, sharded_profile, out):
        with pytest.raises(Stopped):
            quantize(sharded, sharded_plan, out, profile=sharded_profile, report=time_limited(quiet, "0.000001s"))
        shutil.rmtree(out.with_name(".out.partial") / "result")
        with pytest.warns(UserWarning, match="starts over: result/"):
            quantize(sharded, sharded_plan, out, profile=sharded_profile)
        assert contents(out) == contents(
            quantize(sharded, sharded_plan, out.with_name("whole"), profile=sharded_profile)
        )


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own in memory, mounted with the options that it is called with."""

    class Disk:
        folder = tmp_path / "disk"

        def __call__(self, options):
            command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
            if shutil.which("mount") is None or subprocess.run(command, check=False, capture_output=True).returncode:
                pytest.skip("mounting is not allowed here")

    disk = Disk()
    disk.folder.mkdir()
    yield disk
    if os.path.ismount(disk.folder):
        subprocess.run(["umount", str(disk.folder)], check=True)


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes are free on every disk."""

    def set_free(size):
        usage = shutil._ntuple_diskusage(10**15, 10**15 - size, size)
        monkeypatch.setattr(unfinished.shutil, "disk_usage", lambda _: usage)

    return set_free


class TestSpace:
    def test_too_little_is_refused_before_anything_is_written(self, work, sharded, out, free):
        free(2**17)
        message = refusal(work, sharded, out)
        assert message.startswith(f"{out} needs about 0.00")
        assert message.endswith(" GiB, 0.000122 GiB are free on its disk: free some, or choose an -o on another disk")
        assert list(out.parent.iterdir()) == []

    def test_just_enough_will_do(self, sharded, sharded_plan, sharded_profile, texts, out, free):
        view = open_model(sharded, keep=False)
        needs = disk_needed(view, sharded_plan, sharded_profile, METHODS["gptq"], "full")
        free(needs - 1)
        refusal(quantize, sharded, sharded_plan, out, profile=sharded_profile, cache="full")
        free(needs)
        assert quantize(sharded, sharded_plan, out, profile=sharded_profile, cache="full").is_dir()
        counts = [record.tokens for record in sharded_profile.record.distributions.values()]
        needs = profile_disk_bytes(view, sum(counts), len(counts))
        free(needs - 1)
        refusal(profile, sharded, [texts["wiki"]], out.with_name("profile"), **SMALL)
        free(needs)
        profile(sharded, [texts["wiki"]], out.with_name("profile"), **SMALL)

    def test_what_an_unfinished_run_holds_is_there_for_it(self, sharded, sharded_plan, sharded_profile, out, free):
        needs = disk_needed(open_model(sharded, keep=False), sharded_plan, sharded_profile, METHODS["gptq"], None)
        with pytest.raises(Stopped):
            quantize(sharded, sharded_plan, out, profile=sharded_profile, report=time_limited(quiet, "0.000001s"))
        held = sum(map(len, contents(out.with_name(".out.partial")).values()))
        assert held > needs // 10
        free(needs - held - 1)
        assert "needs about" in refusal(quantize, sharded, sharded_plan, out, profile=sharded_profile)
        assert sum(map(len, contents(out.with_name(".out.partial")).values())) == held
        free(needs - held)
        assert quantize(sharded, sharded_plan, out, profile=sharded_profile).is_dir()

    @pytest.mark.parametrize("cache", [None, "10%", "full"])
    def test_quantize_takes_about_what_it_says(self, cache, sharded, sharded_plan, sharded_profile, out, most):
        quantize(sharded, sharded_plan, out, profile=sharded_profile, cache=cache)
        said = disk_needed(open_model(sharded, keep=False), sharded_plan, sharded_profile, METHODS["gptq"], cache)
        assert said == disk_needed(open_model(sharded), sharded_plan, sharded_profile, METHODS["gptq"], cache)
        # small files are left out
        assert 0.8 * most() < said < 1.2 * most()

    def test_profile_takes_about_what_it_says(self, sharded, texts, out, most):
        found = profile(sharded, [texts["wiki"], texts["novels"]], out, samples=16, context=128, self_samples=8)
        counts = [record.tokens for record in found.record.distributions.values()]
        said = profile_disk_bytes(open_model(sharded, keep=False), sum(counts), len(counts))
        assert 0.8 * most() < said < 1.2 * most()

    @pytest.fixture
    def most(self, out, monkeypatch):
        """The most bytes that a run had on the disk, the copied tokenizer left out."""
        sizes = []

        def measure():
            files = out.with_name(".out.partial").rglob("*.safetensors")
            sizes.append(sum(path.stat().st_size for path in files))

        def measured(name, owner):
            call = getattr(owner, name)

            def after(*args, **options):
                found = call(*args, **options)
                measure()
                return found

            monkeypatch.setattr(owner, name, after)

        measured("save", ResumableRun)
        measured("mark_done", ResumableRun)
        measured("write_shard", written)
        measured("write_profile", profiler)
        return lambda: max(sizes)

    def test_the_whole_job_is_refused_before_it_measures(self, sharded, small_disk, tmp_path):
        small_disk("size=400k")
        (tmp_path / "text.txt").write_text("The cat sat on the mat. " * 4000)
        command = [
            sys.executable, "-m", "moqa", "quantize", str(sharded), "--data", f"t={tmp_path / 'text.txt'}", "--bpw",
            "6", "--samples", "2", "--context", "16", "--self-samples", "1", "--no-proof", "-o",
            str(small_disk.folder / "out"),
        ]  # fmt: skip
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith(f"moqa: {small_disk.folder / 'out'} needs about 0.00")
        assert done.stderr.count("\n") == 1
        assert list(small_disk.folder.iterdir()) == []

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_every_strategy_plans_from_a_profile_that_is_not_there_yet(self, strategy, sharded):
        view = open_model(sharded, keep=False)
        blank = blank_profile(view, str(sharded), ["t"], Settings(samples=2, context=16), 1)
        budget = None if strategy in ("paper", "paper-v1", "uniform") else Budget.parse(bpw=6)
        chosen = plan(
            blank, budget, strategy=strategy, known=["t"], widths=(4,) if strategy == "uniform" else (2, 4, 8)
        )
        assert disk_needed(view, chosen, blank, METHODS["gptq"], None) > chosen.account.checkpoint > 0


class TestTimeLimit:
    @pytest.mark.parametrize("text", ["0", "abc", "-5s", "0s", "0.0h", "", "5", "s", "1e3s", "inf s", "5 weeks"])
    def test_no_times(self, text):
        assert refusal(seconds_of, text) == f"--time-limit {text} is not a time: give e.g. 90m, 2h or 1.5d"

    def test_every_run_gets_one_piece_further(self, work, sharded, out):
        stops = []
        for _ in range(10):
            try:
                work(sharded, out, time_limited(quiet, "0.000001s"))
            except Stopped as stop:
                stops.append(str(stop))
                assert not out.exists()
            else:
                break
        assert 1 <= len(stops) == len(set(stops)) < 10
        work(sharded, out.with_name("whole"))
        assert contents(out) == contents(out.with_name("whole"))

    def test_of_the_command(self, sharded, out, tmp_path):
        (tmp_path / "text.txt").write_text("The cat sat on the mat. " * 4000)
        command = [
            sys.executable, "-m", "moqa", "profile", str(sharded), "--data", f"t={tmp_path / 'text.txt'}", "-o",
            str(out), "--samples", "4", "--context", "32", "--self-samples", "0", "--time-limit",
        ]  # fmt: skip
        found = subprocess.run([*command, "-5s"], check=False, capture_output=True, text=True)
        message = "moqa: --time-limit -5s is not a time: give e.g. 90m, 2h or 1.5d\n"
        assert (found.returncode, found.stderr) == (2, message)
        assert list(out.parent.iterdir()) == []
        found = subprocess.run([*command, "0.000001s"], check=False, capture_output=True, text=True)
        assert found.returncode == 75
        assert found.stderr.endswith("in activation 1/2; the same command continues from there\n")
        assert subprocess.run([*command, "1h"], check=False, capture_output=True).returncode == 0
