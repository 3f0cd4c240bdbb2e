"""What long work shows: pace and time left, plain lines, the live view, the log; by a clock of our own."""

import io
import json
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from moqa import MoqaError
from moqa.cli.progress import Log, logged, views
from moqa.cli.progress.steps import PACE_PIECES, Step, Steps
from moqa.cli.progress.views import Lines, Terminal
from moqa.memory import process

FACTS = {"layer": 3, "expert": 17, "experts": 64, "error": 0.01234, "tokens": 640}


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def memory(monkeypatch):
    """700 MB, and 1.5 GB at the peak."""
    for module in (views, sys.modules["moqa.cli.progress.log"]):
        monkeypatch.setattr(module, "used", lambda: (700_000_000, 1_500_000_000))


def read(path):
    """A log's lines, all of them whole."""
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


class TestSteps:
    def test_time_left_needs_two_measured_pieces(self, clock):
        step, left = Step("quantize", clock), []
        for done in range(4):
            step.update(done, 10, {})
            left.append(step.seconds_left)
            clock.now += 5
        assert left == [None, None, 40, 35]

    def test_time_left_goes_down_while_a_piece_is_at_work(self, clock):
        step = Step("quantize", clock)
        for done in range(3):
            step.update(done, 4, {})
            clock.now += 10
        clock.now -= 10
        left = []
        for _ in range(4):
            left.append(step.seconds_left)
            clock.now += 4
        # a piece that takes longer than the others leaves the last one to come
        assert left == [20, 16, 12, 10]

    def test_reports_within_a_piece_are_no_measurement(self, clock):
        step = Step("quantize", clock)
        for expert in range(50):
            step.update(0, 2, {"expert": expert})
            clock.now += 1
        assert step.seconds_left is None

    def test_the_pace_is_that_of_the_last_pieces(self, clock):
        step, pieces = Step("samples", clock), 20
        for done in range(pieces + PACE_PIECES + 1):
            step.update(done, 100, {})
            clock.now += 1 if done < pieces else 30
        clock.now -= 30
        assert step.seconds_left == 30 * (100 - pieces - PACE_PIECES)

    def test_a_count_that_does_not_start_at_zero(self, clock):
        step = Step("sensitivity", clock)
        for done in (25, 26, 28):
            step.update(done, 30, {})
            clock.now += 3
        clock.now -= 3
        assert step.seconds_left == 4

    def test_nothing_is_left_at_the_end(self, clock):
        step = Step("cache", clock)
        step.update(1, 1, {})
        assert step.seconds_left == 0

    def test_facts_of_the_moment_go_and_facts_so_far_stay(self, clock):
        step = Step("quantize", clock)
        step.update(3, 8, FACTS)
        step.update(4, 8, {"layer": 4})
        assert step.facts == {"layer": 4, "error": 0.01234, "tokens": 640}
        step.update(5, 8, {"layer": 5, "error": 0.5})
        assert step.facts == {"layer": 5, "error": 0.5, "tokens": 640}

    def test_tokens_per_second(self, clock):
        step = Step("quantize", clock)
        step.update(0, 8, {"tokens": 0})
        assert step.tokens_per_second is None
        clock.now += 4
        step.update(0, 8, {"tokens": 2000})
        clock.now += 4
        step.update(1, 8, {})
        assert step.tokens_per_second == 500

    def test_what_begins_a_step_and_what_ends_one(self, clock):
        seen = []

        class Seen:
            def show(self, step):
                if ("begin", step) not in seen:
                    seen.append(("begin", step))

            def end(self, step):
                seen.append(("end", step))

        report = Steps([Seen()], clock)
        for name, done in (("a", 0), ("a", 1), ("b", 1), ("b", 2), ("b", 2), ("b", 0), ("b", 1)):
            report(name, done, 2)
        report.end()
        report.end()
        assert [(what, step.name) for what, step in seen] == [
            ("begin", "a"), ("end", "a"), ("begin", "b"), ("end", "b"), ("begin", "b"), ("end", "b"),
        ]  # fmt: skip
        assert len({step for _, step in seen}) == 3
        assert all(step.over for _, step in seen)


class TestWords:
    def test_facts(self, clock):
        step = Step("quantize", clock)
        clock.now += 2
        step.update(3, 8, FACTS | {"distribution": "wiki"})
        expected = ["layer 3", "expert 17/64", "error 0.0123", "distribution wiki", "320 tokens/s"]
        assert sorted(views.facts(step)) == sorted(expected)
        step.update(3, 8, {"experts": 64})
        assert "experts 64" in views.facts(step)

    @pytest.mark.parametrize(
        ("seconds", "text"), [(0.4, "00:00"), (62.3, "01:02"), (3662, "1:01:02"), (90_000, "1 day, 1:00:00")]
    )
    def test_times(self, seconds, text):
        assert views.span(seconds) == text

    def test_memory_of_this_process(self):
        now, peak = process.used()
        assert 20e6 < now <= peak < 1e12

    def test_memory_where_there_is_no_proc(self, monkeypatch):
        import resource

        monkeypatch.setattr(process, "Path", lambda _: Path("/none"))
        now, peak = process.used()
        assert now is None
        assert 0.5 < peak / (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) <= 1
        assert process.resident() >= peak
        assert views.gib(now) == "-"


@pytest.mark.usefixtures("memory")
class TestLines:
    def test_a_step_from_its_beginning_to_its_end(self, clock, capsys):
        report = Steps([Lines(clock)], clock)
        for layer in range(6):
            report("quantize", layer, 6, **(FACTS | {"layer": layer, "tokens": 100 * layer}))
            clock.now += 4
        report("quantize", 6, 6)
        out, err = capsys.readouterr()
        memory = "0.65 GiB (peak 1.40)"
        assert out == ""
        assert err.splitlines() == [
            "moqa: quantize",
            f"moqa: quantize 3/6, layer 3, expert 17/64, error 0.0123, 25 tokens/s, {memory}, 00:12 so far, 00:12 left",
            f"moqa: quantize 6/6, error 0.0123, 25 tokens/s, {memory}, took 00:24",
        ]

    def test_says_no_time_left_that_it_does_not_know(self, clock, capsys):
        report = Steps([Lines(clock)], clock)
        report("quantize", 0, 6)
        clock.now += 11
        report("quantize", 0, 6, expert=1)
        assert capsys.readouterr().err.splitlines()[-1] == (
            "moqa: quantize 0/6, expert 1, 0.65 GiB (peak 1.40), 00:11 so far"
        )

    def test_the_next_step_ends_the_last(self, clock, capsys):
        report = Steps([Lines(clock)], clock)
        report("labels", 6, 14)
        clock.now += 1
        report("sensitivity", 7, 14)
        assert capsys.readouterr().err.splitlines() == [
            "moqa: labels", "moqa: labels 6/14, 0.65 GiB (peak 1.40), took 00:01", "moqa: sensitivity",
        ]  # fmt: skip


@pytest.mark.usefixtures("memory")
class TestTerminal:
    @staticmethod
    def shown(width, clock, work):
        console = Console(force_terminal=True, width=width, file=io.StringIO(), _environ={"TERM": "xterm"})
        with Terminal(console) as view:
            work(Steps([view], clock))
            console.file.truncate(0)
        return console.file.getvalue()

    def work(self, clock):
        def steps(report):
            report("activation", 0, 2)
            clock.now += 3
            for layer in range(3):
                report("quantize", layer, 8, **(FACTS | {"layer": layer, "tokens": 4000 * layer}))
                clock.now += 20
            clock.now -= 20

        return steps

    def test_one_line_per_step(self, clock):
        text = self.shown(120, clock, self.work(clock))
        first = next(line for line in text.splitlines() if "activation" in line)
        last = next(line for line in text.splitlines() if "quantize" in line)
        assert first.split()[-2:] == ["0/2", "00:03"]
        facts = "2/8 layer 2 expert 17/64 error 0.0123 200 tokens/s 0.65 (1.40) 00:40 02:00"
        assert " ".join(last.split()).endswith(facts)
        assert "━" in last

    def test_a_narrow_terminal_gives_up_facts_first(self, clock):
        text = self.shown(80, clock, self.work(clock))
        last = next(line for line in text.splitlines() if "quantize" in line)
        assert "2/8 layer 2 expert" in " ".join(last.split())
        assert "…" in last
        assert last.split()[-4:] == ["0.65", "(1.40)", "00:40", "02:00"]

    def test_a_step_that_comes_again_keeps_its_line(self, clock):
        def twice(report):
            for name in ("evaluate", "quantize", "evaluate"):
                report(name, 0, 2)
                report(name, 1, 2)

        text = self.shown(120, clock, twice)
        assert text.count("evaluate") == text.count("quantize")

    def test_a_result_in_a_pipe_is_not_drawn_into(self, clock, capsys):
        drawn = self.shown(120, clock, lambda report: print('{"bytes": 1}'))
        assert capsys.readouterr().out == '{"bytes": 1}\n'
        assert "bytes" not in drawn


@pytest.mark.usefixtures("memory")
class TestLog:
    def test_a_run_from_its_beginning_to_its_end(self, clock, tmp_path):
        log = Log(str(tmp_path / "log"), clock)
        with log.lasting("quantize"):
            report = Steps([log], clock)
            for layer in range(3):
                clock.now += 2
                report("quantize", layer, 4, **(FACTS | {"layer": layer}))
            report.end()
        start, *reports, end = read(tmp_path / "log")
        for line in (start, *reports, end):
            assert datetime.fromisoformat(line.pop("time")).utcoffset() == timedelta(0)
        assert start == {"event": "start", "command": "quantize", "moqa": "0.1.0"}
        common = {"step": "quantize", "total": 4, "memory_bytes": 700_000_000, "peak_bytes": 1_500_000_000}
        assert reports == [
            common | FACTS | {"done": 0, "layer": 0, "seconds": 2, "seconds_left": None},
            common | FACTS | {"done": 1, "layer": 1, "seconds": 4, "seconds_left": None},
            common | FACTS | {"done": 2, "layer": 2, "seconds": 6, "seconds_left": 4},
        ]
        assert end == {"event": "end", "ok": True, "error": None, "seconds": 6}

    def test_first_and_last_of_a_step_and_ten_per_second_between(self, clock, tmp_path):
        log = Log(str(tmp_path / "log"), clock)
        with log.lasting("profile"):
            report = Steps([log], clock)
            for expert in range(1000):
                report("activation", 0, 8, expert=expert)
                clock.now += 0.001
            report("labels", 1, 8)
            report("sensitivity", 2, 8)
            report("sensitivity", 3, 8)
        reports = read(tmp_path / "log")[1:-1]
        experts = [line["expert"] for line in reports if line["step"] == "activation"]
        assert (experts[0], experts[-1]) == (0, 999)
        assert 10 <= len(experts) <= 12
        assert [(line["step"], line["done"]) for line in reports[-3:]] == [
            ("labels", 1), ("sensitivity", 2), ("sensitivity", 3),
        ]  # fmt: skip

    def test_what_is_no_number_is_null(self, clock, tmp_path):
        log = Log(str(tmp_path / "log"), clock)
        with log.lasting("quantize"):
            Steps([log], clock)("quantize", 0, 1, error=float("nan"), tokens=3)
        assert [read(tmp_path / "log")[1][name] for name in ("error", "tokens")] == [None, 3]

    @pytest.mark.parametrize(
        ("error", "text"),
        [
            (MoqaError("no such thing", "give another"), "no such thing: give another"),
            (KeyboardInterrupt(), "interrupted"),
        ],
    )
    def test_a_run_that_fails(self, clock, tmp_path, error, text):
        log = Log(str(tmp_path / "log"), clock)
        report = Steps([log], clock)

        def work():
            report("quantize", 0, 2)
            report("quantize", 1, 2)
            clock.now += 5
            raise error

        with pytest.raises(type(error)), log.lasting("quantize"):
            work()
        *_, last, end = read(tmp_path / "log")
        assert last["done"] == 1
        assert {"event": "end", "ok": False, "error": text, "seconds": 5}.items() <= end.items()

    def test_a_bug_is_logged_by_type_and_place(self, clock, tmp_path):
        with pytest.raises(ValueError, match="a secret"), Log(str(tmp_path / "log"), clock).lasting("quantize"):
            raise ValueError("a secret text")
        error = read(tmp_path / "log")[-1]["error"]
        assert error.startswith(f"ValueError at {__file__}:")
        assert "secret" not in error

    def test_a_full_disk_costs_the_log_and_not_the_work(self, clock, tmp_path, capsys, monkeypatch):
        log, done = Log(str(tmp_path / "log"), clock), []
        with log.lasting("quantize"):
            report = Steps([log], clock)
            report("quantize", 0, 8)

            def write(*_):
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(log, "_write", write)
            for layer in range(3):
                clock.now += 1
                report("quantize", layer, 8)
                done.append(layer)
        assert done == [0, 1, 2]
        warning = f"moqa: warning: --log-json {tmp_path / 'log'} cannot be written any more: No space left on device\n"
        assert capsys.readouterr().err == warning

    @pytest.mark.parametrize("path", ["none/log", ".", "/dev/full"])
    def test_a_file_that_cannot_be_written_is_found_before_work_starts(self, clock, tmp_path, monkeypatch, path):
        monkeypatch.chdir(tmp_path)
        worked = []
        with pytest.raises(MoqaError, match=rf"--log-json {path} cannot be written: \w+"):
            logged(lambda log_json: worked.append(log_json))(log_json=Log(path, clock))
        assert not worked

    def test_on_stderr_lines_are_never_wrapped(self, clock, capsys):
        log = Log("-", clock)
        with log.lasting("quantize"):
            Steps([log], clock)("quantize", 0, 1, **{f"name{index}": "x [b]y " * 9 for index in range(20)})
        out, err = capsys.readouterr()
        assert out == ""
        assert [json.loads(line).get("event") for line in err.splitlines()] == ["start", None, "end"]


def test_a_dumb_terminal_gets_lines(monkeypatch, capsys):
    from moqa.cli import progress

    dumb = Console(force_terminal=True, stderr=True, _environ={"TERM": "dumb"})
    monkeypatch.setattr(progress, "console", dumb)
    with progress.progress() as report:
        report("quantize", 0, 4)
    assert capsys.readouterr().err.startswith("moqa: quantize\n")


def test_a_terminal_shows_at_once_that_something_is_done(monkeypatch, capsys):
    from moqa.cli import progress

    terminal = Console(force_terminal=True, stderr=True, width=100, _environ={"TERM": "xterm"})
    monkeypatch.setattr(progress, "console", terminal)
    with progress.progress() as report:
        pass
    assert "start" in capsys.readouterr().err
    with progress.progress() as report:
        report("quantize", 0, 4)
    assert "0/4" in capsys.readouterr().err
