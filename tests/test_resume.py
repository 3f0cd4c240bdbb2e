"""Long work that is killed: the same call goes on, and the bytes are those of an undisturbed run."""

import errno
import os
import random
import resource
import subprocess
import sys
import time

import pytest
import torch

from moqa.errors import MoqaError, Stopped
from moqa.planning import for_file, plan
from moqa.profiling import profile
from moqa.quantization import quantize
from moqa.storage import resumable as unfinished_module
from moqa.storage.artifact import write_json
from moqa.storage.resumable import resumable

SMALL = {"samples": 6, "context": 32, "self_samples": 2}
each_method = pytest.mark.parametrize("method", ["gptq", "rtn"])


@pytest.fixture(scope="module")
def profiled(tiny_model, texts, tmp_path_factory):
    return profile(tiny_model, [texts["wiki"]], tmp_path_factory.mktemp("profile") / "tiny", **SMALL)


@pytest.fixture(scope="module")
def planned(profiled):
    return plan(profiled, strategy="uniform", widths=(3,))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stop_at(number, error=Stopped):
    """A listener that ends the work when it hears something for the `number`-th time."""
    heard = 0

    def report(step, done, total, **_):
        nonlocal heard
        heard += 1
        if heard == number:
            raise error

    return report


class TestQuantize:
    @each_method
    def test_goes_on_after_every_stop(self, method, tiny_model, planned, profiled, tmp_path):
        whole = quantize(tiny_model, planned, tmp_path / "whole", method=method, profile=profiled, cache="full")
        for number in range(1, 100):
            try:
                out = tmp_path / "out"
                quantize(
                    tiny_model, planned, out, method=method, report=stop_at(number), profile=profiled, cache="full"
                )
            except Stopped:
                assert not out.exists()
            else:
                break
        assert 1 < number < 20
        assert contents(out) == contents(whole)
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    def test_finished_layers_are_not_made_again(self, tiny_model, planned, profiled, tmp_path):
        with pytest.raises(Stopped):
            quantize(tiny_model, planned, tmp_path / "out", profile=profiled, report=stop_at(4))
        shards = list((tmp_path / ".out.partial" / "result").glob("model-*"))
        before = {path.name: path.stat().st_mtime_ns for path in shards}
        assert len(before) >= 2
        out = quantize(tiny_model, planned, tmp_path / "out", profile=profiled)
        assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in before.items())

    @pytest.mark.parametrize(
        ("changed", "named"), [({"method": "rtn"}, "method"), ({"cache": "full"}, "cache")], ids=["method", "cache"]
    )
    def test_another_job_is_refused_unless_restarted(self, changed, named, tiny_model, planned, profiled, tmp_path):
        with pytest.raises(Stopped):
            quantize(tiny_model, planned, tmp_path / "out", profile=profiled, report=stop_at(3))
        with pytest.raises(MoqaError, match=f"unfinished run with {named} .*--restart"):
            quantize(tiny_model, planned, tmp_path / "out", profile=profiled, **changed)
        out = quantize(tiny_model, planned, tmp_path / "out", profile=profiled, restart=True, **changed)
        whole = quantize(tiny_model, planned, tmp_path / "whole", profile=profiled, **changed)
        assert contents(out) == contents(whole)

    def test_damaged_work_starts_over_and_says_so(self, tiny_model, planned, profiled, tmp_path):
        whole = quantize(tiny_model, planned, tmp_path / "whole", profile=profiled)
        with pytest.raises(Stopped):
            quantize(tiny_model, planned, tmp_path / "out", profile=profiled, report=stop_at(4))
        for path in (tmp_path / ".out.partial" / "steps").glob("hidden-*"):
            path.write_bytes(path.read_bytes()[:-9])
        with pytest.warns(UserWarning, match=r"starts over: steps/hidden-1-\S+ is not as it was written"):
            out = quantize(tiny_model, planned, tmp_path / "out", profile=profiled)
        assert contents(out) == contents(whole)

    def test_hidden_states_that_are_gone_are_not_made_up(self, tiny_model, planned, profiled, tmp_path):
        with pytest.raises(Stopped):
            quantize(tiny_model, planned, tmp_path / "out", profile=profiled, report=stop_at(4))
        for path in (tmp_path / ".out.partial" / "steps").glob("hidden-*"):
            path.unlink()
        with pytest.raises(MoqaError, match=r"hidden-1-\S+ is damaged.*the same command starts over"):
            quantize(tiny_model, planned, tmp_path / "out", profile=profiled)
        assert list(tmp_path.iterdir()) == []

    def test_temporary_files_stay_bounded(self, tiny_model, planned, profiled, tmp_path):
        seen = []

        def report(step, done, total, **_):
            steps = (tmp_path / ".out.partial" / "steps").glob("hidden-*")
            seen.append(len({path.name.split("-")[1] for path in steps}))

        quantize(tiny_model, planned, tmp_path / "out", profile=profiled, report=report)
        assert max(seen) <= 2


class TestProfile:
    def test_goes_on_after_every_stop(self, tiny_model, texts, profiled, tmp_path):
        for number in range(1, 100):
            try:
                out = tmp_path / "out"
                profile(tiny_model, [texts["wiki"]], out, report=stop_at(number), **SMALL)
            except Stopped:
                assert not out.exists()
            else:
                break
        assert 1 < number < 30
        assert contents(out) == contents(profiled.folder)


class TestUnfinished:
    def test_a_second_process_is_refused(self, tmp_path):
        with (
            resumable(tmp_path / "out", {}) as work,
            pytest.raises(MoqaError, match="being written by another process"),
            resumable(tmp_path / "out", {}),
        ):
            raise AssertionError(work)

    def test_what_was_put_aside_comes_back(self, tmp_path):
        def begin():
            with resumable(tmp_path / "out", {"a": 1}) as work:
                work.save("x", {"y": torch.arange(3)})
                work.mark_done("first", {"error": 0.5})
                raise Stopped

        with pytest.raises(Stopped):
            begin()
        with resumable(tmp_path / "out", {"a": 1}) as work:
            assert work.done("first") == {"error": 0.5}
            assert work.done("second") is None
            assert torch.equal(work.load("x")["y"], torch.arange(3))
        assert (tmp_path / "out").is_dir()

    def test_a_full_disk_keeps_what_is_done(self, tmp_path, monkeypatch):
        def full(_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def fill():
            with resumable(tmp_path / "out", {}) as work:
                work.mark_done("first", {})
                monkeypatch.setattr(unfinished_module, "sync", full)
                work.mark_done("second", {})

        with pytest.raises(MoqaError, match=r"No space left.*same command"):
            fill()
        monkeypatch.undo()
        with resumable(tmp_path / "out", {}) as work:
            assert work.done("first") == {}
            assert work.done("second") is None

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(MoqaError, match="cannot be written"), resumable(tmp_path / "file" / "out", {}):
            pass


def run(tiny_model, plan_file, profile_folder, out, limit=None, kill_after=None):
    """The command in a process of its own, which may write no file larger than `limit`: exit status and errors."""
    command = [
        sys.executable, "-m", "moqa", "quantize", str(tiny_model), "--plan", str(plan_file), "--profile",
        str(profile_folder), "-o", str(out),
    ]  # fmt: skip
    bounded = None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        # a process that runs into the timeout is ended by SIGKILL
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, preexec_fn=bounded, timeout=kill_after
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def job(tiny_model, planned, profiled, tmp_path_factory):
    """Arguments of `run`, the result of an undisturbed run, and how long it takes."""
    root = tmp_path_factory.mktemp("job")
    write_json(for_file(planned, root / "plan.json"), root / "plan.json")
    given, began = (tiny_model, root / "plan.json", profiled.folder), time.monotonic()
    assert run(*given, root / "whole")[0] == 0
    return given, contents(root / "whole"), time.monotonic() - began


def killed_again_and_again(job, out, times):
    given, whole, seconds = job
    random.seed(0)
    for _ in range(times):
        run(*given, out, kill_after=random.uniform(0.3, 1.0) * seconds)
    status, stderr = run(*given, out)
    assert status == 0 or f"{out} exists" in stderr, stderr
    assert contents(out) == whole


class TestCommand:
    def test_survives_kills(self, job, tmp_path):
        killed_again_and_again(job, tmp_path / "out", 4)

    @pytest.mark.slow
    def test_survives_fifty_kills(self, job, tmp_path):
        for number in range(10):
            killed_again_and_again(job, tmp_path / f"out-{number}", 5)

    def test_survives_a_full_disk(self, job, tmp_path):
        given, whole, _ = job
        status, stderr = run(*given, tmp_path / "out", limit=max(map(len, whole.values())) - 1)
        assert status == 2
        assert "could not be written" in stderr
        assert run(*given, tmp_path / "out")[0] == 0
        assert contents(tmp_path / "out") == whole
