"""Progress and logs of real commands, and on a real terminal."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moqa.cli.main import main

ROOT = Path(__file__).parents[1]
MODEL, TEXT = ROOT / "reference" / "model", ROOT / "reference" / "text" / "wiki.calib.txt"
SIZES = ("--samples", "4", "--context", "64", "--self-samples", "2", "--method", "rtn")
PROFILE = ("profile", MODEL, "--data", f"wiki={TEXT}", *SIZES)


def read(path):
    """A log's lines, all of them whole."""
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def command(*args):
    typed = [sys.executable, "-m", "moqa", *map(str, args)]
    return subprocess.Popen(typed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def logs(path, count, process):
    """Wait until a running command has logged some lines."""
    for _ in range(6000):
        if path.exists() and path.read_text().count("\n") >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    pytest.fail("nothing was logged")


class TestCommands:
    def test_profile_in_lines_and_log(self, tmp_path):
        process = command(*PROFILE, "-o", tmp_path / "p", "--json", "-", "--log-json", tmp_path / "log")
        out, err = process.communicate()
        assert process.returncode == 0, err
        start, *reports, end = read(tmp_path / "log")
        assert (start["event"], start["command"]) == ("start", "profile")
        assert (end["event"], end["ok"], end["error"]) == ("end", True, None)
        steps = list(dict.fromkeys(line["step"] for line in reports))
        assert steps == ["self-sampling", "activation", "sensitivity"]
        for line in reports:
            assert 0 <= line["done"] <= line["total"]
            assert 50e6 < line["memory_bytes"] <= line["peak_bytes"]
        seconds = [line["seconds"] for line in (*reports, end)]
        assert seconds == sorted(seconds)
        begun = [
            line.removeprefix("moqa: ")
            for line in err.splitlines()
            if line.startswith("moqa: ") and len(line.split()) == 2
        ]
        assert begun == steps
        assert sum(", took " in line for line in err.splitlines()) == len(steps)
        assert json.loads(out)["model"]

    def test_quantize_and_adjust(self, tmp_path, monkeypatch):
        data, out = ("--data", f"wiki={TEXT}"), tmp_path / "out"
        small = ("--samples", "2", "--context", "16", "--self-samples", "0", "--hedge", "0", "--method", "rtn")
        works = {
            "whole": ("quantize", MODEL, "--bpw", "3", *data, *small, "--no-proof", "--cache", "full", "-o", out),
            "plan": ("quantize", MODEL, "--plan", out / "plan.json", "-o", tmp_path / "again"),
            "adjust": ("adjust", out, "--data", f"math={TEXT.with_name('math.calib.txt')}", "--samples", "8",
                       "-o", tmp_path / "math"),
        }  # fmt: skip
        steps = {}
        for name, typed in works.items():
            monkeypatch.setattr(sys, "argv", ["moqa", *map(str, typed), "--log-json", str(tmp_path / name)])
            with pytest.raises(SystemExit) as stop:
                main()
            start, *reports, end = read(tmp_path / name)
            assert (stop.value.code, start["command"], end["ok"]) == (0, typed[0], True)
            steps[name] = list(dict.fromkeys(line["step"] for line in reports))
        assert steps == {
            "whole": ["activation", "sensitivity", "cache", "quantize"],
            "plan": ["quantize"],
            "adjust": ["samples", "fit"],
        }

    def test_a_log_and_a_result_on_two_streams(self, tmp_path):
        work = ("evaluate", MODEL, "--data", f"wiki={TEXT}", "--windows", "2", "--context", "64")
        process = command(*work, "--json", "-", "--log-json", "-")
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert json.loads(out)["distributions"]["wiki"]["tokens"] == 2 * 63
        found = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
        assert (found[0]["event"], found[-1]["ok"]) == ("start", True)
        assert [line["done"] for line in found[1:-1]][-1] == found[1]["total"]
        assert "moqa: evaluate" in err.splitlines()

    @pytest.mark.parametrize(("how", "last"), [(signal.SIGINT, "interrupted"), (signal.SIGKILL, None)])
    def test_a_run_that_is_stopped_in_the_middle(self, tmp_path, how, last):
        # more work than is done before the signal comes
        process = command(*PROFILE, "--samples", "4000", "-o", tmp_path / "p", "--log-json", tmp_path / "log")
        logs(tmp_path / "log", 3, process)
        process.send_signal(how)
        process.communicate()
        found = read(tmp_path / "log")
        assert process.returncode == (130 if last else -signal.SIGKILL)
        assert found[0]["event"] == "start"
        assert all("step" in line for line in found[1:3])
        if last:
            assert (found[-1]["ok"], found[-1]["error"]) == (False, last)
        else:
            assert all("event" not in line for line in found[1:])

    @pytest.mark.parametrize("name", ["profile", "quantize", "adjust", "evaluate"])
    def test_a_mistake_ends_the_log(self, name, tmp_path, monkeypatch, capsys):
        out = [] if name == "evaluate" else ["-o", tmp_path / "out"]
        size = ["--bpw", "3"] if name == "quantize" else []
        typed = [name, tmp_path / "none", "--data", "wiki=none.txt", *out, *size, "--log-json", tmp_path / "log"]
        monkeypatch.setattr(sys, "argv", ["moqa", *map(str, typed)])
        with pytest.raises(SystemExit) as stop:
            main()
        start, end = read(tmp_path / "log")
        assert stop.value.code == 2
        assert start["command"] == name
        assert end["ok"] is False
        assert capsys.readouterr().err == f"moqa: {end['error']}\n"

    def test_a_log_that_cannot_be_written_is_a_mistake(self, tmp_path, monkeypatch, capsys):
        typed = [*PROFILE, "-o", tmp_path / "p", "--log-json", tmp_path / "none" / "log"]
        monkeypatch.setattr(sys, "argv", ["moqa", *map(str, typed)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        path = tmp_path / "none" / "log"
        assert capsys.readouterr().err == f"moqa: --log-json {path} cannot be written: No such file or directory\n"
        assert not (tmp_path / "p").exists()


SCRIPT = """
import sys
from moqa.cli.progress import Log, progress
log = Log("-")
with log.lasting("quantize"), progress(log) as report:
    report("quantize", 0, 4, layer=0)
    report("quantize", 1, 4, layer=1, error=0.0123)
    print("a warning", file=sys.stderr)
    print("a result")
"""


def test_a_real_terminal(tmp_path):
    """Bars on stderr that is a terminal, JSON lines whole above them, and only the result in the pipe."""
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # Linux tells the end of a terminal so
        pass
    os.close(ours)
    out, _ = process.communicate()
    assert (process.returncode, out) == (0, b"a result\n")
    text = shown.decode()
    found = [json.loads(line[line.index("{") :]) for line in text.splitlines() if '"time"' in line]
    assert [line.get("event") for line in found] == ["start", None, None, "end"]
    assert "a warning" in text
    assert "━" in text
    assert "layer 1 error 0.0123" in text
