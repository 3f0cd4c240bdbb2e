"""`moqa serve --adjust auto`: adjustments that the server makes itself, for each client of its own text."""

import json
import logging
import threading
import time
from contextlib import ExitStack, contextmanager
from functools import partial

import httpx
import numpy as np
import pytest
import torch
from conftest import REFERENCE
from serving import GREEDY, PATIENCE, alone, complete, fails, gauges, running

import moqa
from moqa.adjustment import adjust
from moqa.adjustment.drift import DriftDetector
from moqa.data import Distribution
from moqa.errors import MoqaError
from moqa.format.adjustment import read_adjustment
from moqa.format.reader import open_checkpoint
from moqa.format.routing import ROUTING, read_routing
from moqa.runtime.routing import RoutingCounts
from moqa.serve import auto
from moqa.serve.auto import MAX_TOKENS, AutoAdjusting
from moqa.serve.kept import LoadedAdjustments, MadeAdjustment
from moqa.serve.sessions import COOKIE
from moqa.serve.watch import PART, Collected, Watch

SHARE = "30%"  # of a tiny random model; less changes too little


@pytest.fixture
def watched(made, monkeypatch):
    """A server that thinks that all text is novel, and how it makes adjustments."""
    model, tokenizer = moqa.load(made[0])
    calls = []

    def make(folder, data, out, report):
        calls.append(data[0])
        report("made", 0, 1)
        adjust(folder, data, out, samples=8, budget=SHARE)

    monkeypatch.setattr(auto, "adjust", make)
    monkeypatch.setattr(auto, "MIN_TOKENS", 2400)
    monkeypatch.setattr(auto, "PAUSE_FACTOR", 0)
    return model, tokenizer, calls


def until_made(http, **options):
    """Ask until something has come of a making in the background."""
    end = time.monotonic() + PATIENCE
    while True:
        found = complete(http, **options).json()
        shown = gauges(http)
        if shown["moqa_adjustments",] or shown["moqa_adjustment_failures_total",]:
            return found, shown
        assert time.monotonic() < end, shown
        time.sleep(0.05)


class TestAuto:
    PROMPT = " ".join(["a few words that are asked again and again, number", *map(str, range(700))])

    def test_makes_one_for_novel_text_and_uses_it(self, made, watched, monkeypatch, tmp_path):
        model, tokenizer, calls = watched
        kept = tmp_path / "kept"
        real = auto.read_adjustment

        def keep(folder):
            folder.rename(kept)
            return real(kept)

        monkeypatch.setattr(auto, "read_adjustment", keep)
        adjusting = partial(AutoAdjusting, model, tokenizer, made[0])
        with (
            running((model, tokenizer), adjusting=adjusting) as url,
            httpx.Client(base_url=url, timeout=PATIENCE) as http,
        ):
            ask = {"prompt": self.PROMPT, **GREEDY}
            unknown = complete(http, **ask).json()
            assert (unknown["adjustment"], unknown["drift"]) == (None, None), "its cookie did not come back yet"
            first = complete(http, **ask).json()
            assert first["choices"] == unknown["choices"]
            assert (first["adjustment"], first["drift"]) == (None, "novel")
            _, shown = until_made(http, **ask)
            found = complete(http, **ask).json()
            assert found["adjustment"] == "auto-1"
            assert complete(http, adjustment=None, **ask).json()["choices"] == first["choices"]
            assert complete(http, adjustment="auto-1", **ask).json()["choices"] == found["choices"]
            fails(complete(http, adjustment="auto-2", **ask), 400, "adjustment", "auto-1")
            assert shown["moqa_drift_state",] == 2
            assert 0.1 < shown["moqa_drift_divergence_bits",] <= 1
            assert shown["moqa_adjustments",] == 1
            assert shown["moqa_adjustment_seconds",] > 0
            assert gauges(http)["moqa_adjusted_requests_total", "auto"] == 2
        other, _ = moqa.load(made[0])
        other.adjustments.switch(other.adjustments.hold(read_adjustment(kept)))
        assert alone((other, tokenizer), self.PROMPT, **GREEDY)[0] == found["choices"][0]["text"]
        assert "asked again and again" in calls[0].texts[0]
        written = b"".join(path.read_bytes() for path in kept.iterdir())
        assert b"asked again" not in written

    def test_a_failure_is_one_line_without_text(self, made, watched, monkeypatch, caplog):
        model, tokenizer, _ = watched

        def broken(*_, **__):
            raise MoqaError("a few words that are asked")

        monkeypatch.setattr(auto, "adjust", broken)
        adjusting = partial(AutoAdjusting, model, tokenizer, made[0])
        with (
            running((model, tokenizer), adjusting=adjusting) as url,
            httpx.Client(base_url=url, timeout=PATIENCE) as http,
            caplog.at_level(logging.DEBUG, logger="moqa"),
        ):
            found, shown = until_made(http, prompt=self.PROMPT, **GREEDY)
            assert found["adjustment"] is None
            assert shown["moqa_adjustment_failures_total",] == 1
        lines = [record.getMessage() for record in caplog.records if record.name.startswith("moqa")]
        assert lines
        assert all("no adjustment was made: MoqaError" in line and "\n" not in line for line in lines)
        assert "few words" not in caplog.text

    def test_making_one_does_not_hold_up_a_stop(self, made, watched, monkeypatch):
        model, tokenizer, _ = watched
        begun = threading.Event()

        def endless(*_, report, **__):
            begun.set()
            while True:
                report("endless", 0, 1)
                time.sleep(0.01)

        monkeypatch.setattr(auto, "adjust", endless)
        adjusting = partial(AutoAdjusting, model, tokenizer, made[0])
        with (
            running((model, tokenizer), adjusting=adjusting) as url,
            httpx.Client(base_url=url, timeout=PATIENCE) as http,
        ):
            while not begun.is_set():
                assert complete(http, prompt=self.PROMPT, **GREEDY).json()["adjustment"] is None
        assert not any(thread.name == "moqa-adjust" for thread in threading.enumerate())


def shares_of(expert, model):
    """Routing of text whose tokens all go to one expert."""
    layers, experts = RoutingCounts(model).take().shape
    return np.eye(experts)[[expert] * layers]


class TestClients:
    PROMPT = TestAuto.PROMPT

    @pytest.fixture
    def auto_running(self, made, watched):
        """A server that makes adjustments, with some options, and clients of it."""
        model, tokenizer, _ = watched

        @contextmanager
        def run(shared=False, **options):
            adjusting = partial(AutoAdjusting, model, tokenizer, made[0], shared=shared)
            with running((model, tokenizer), adjusting=adjusting, **options) as url, ExitStack() as stack:

                def client(key=""):
                    headers = {"authorization": f"Bearer {key}"} if key else {}
                    return stack.enter_context(httpx.Client(base_url=url, timeout=PATIENCE, headers=headers))

                yield client

        return run

    def ask(self, http, prompt="The history of", **options):
        return complete(http, prompt=prompt, **GREEDY, **options).json()

    def adjusted(self, http):
        """Ask until answers are written with an adjustment."""
        end = time.monotonic() + PATIENCE
        while (found := self.ask(http, self.PROMPT))["adjustment"] is None:
            assert time.monotonic() < end
        return found

    @pytest.mark.parametrize("keys", [(), ("one", "two")])
    def test_have_adjustments_of_their_own_text_only(self, auto_running, keys):
        with auto_running(keys=keys) as client:
            one, two = map(client, keys or ("", ""))
            self.ask(two)
            plain = self.ask(two)
            assert self.adjusted(one)["adjustment"] == "auto-1"
            found = self.ask(two)
            assert (found["adjustment"], found["choices"]) == (None, plain["choices"])
            fails(complete(two, prompt="The", adjustment="auto-1"), 400, "adjustment", "the server has none")
            long = self.adjusted(two)
            assert long["adjustment"] == "auto-1", "names do not tell how many others have"
            assert self.ask(one, adjustment="auto-1")["adjustment"] == "auto-1"
            fails(complete(one, prompt="The", adjustment="made-1"), 400, "adjustment", "auto-1")

    def test_share_them_if_they_are_told_to(self, auto_running):
        with auto_running(shared=True) as client:
            one, two = client(), client()
            assert self.adjusted(one)["adjustment"] == "auto-1"
            assert self.ask(two, self.PROMPT)["adjustment"] == "auto-1"
            assert COOKIE not in one.cookies

    def test_are_told_apart_by_a_cookie_that_they_keep(self, auto_running):
        with auto_running() as client:
            one, two = client(), client()
            found = complete(one, prompt="The", **GREEDY).headers["set-cookie"]
            assert found.startswith(f"{COOKIE}=")
            assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(found.split("; "))
            assert "set-cookie" not in complete(one, prompt="The", **GREEDY).headers
            assert "set-cookie" in complete(two, prompt="The", **GREEDY, stream=True).headers
            assert one.cookies[COOKIE] != two.cookies[COOKIE]
        with auto_running(keys=["right"]) as client:
            assert "set-cookie" not in complete(client("right"), prompt="The", **GREEDY).headers

    def test_beyond_some_are_not_watched_until_others_left(self, auto_running, watched, monkeypatch):
        monkeypatch.setattr(auto, "MAX_CLIENTS", 1)
        with auto_running() as client:
            one, two = client(), client()
            self.ask(two)
            assert self.adjusted(one)["adjustment"] == "auto-1"
            assert [self.ask(two, self.PROMPT)["drift"] for _ in range(3)] == [None] * 3
            assert self.ask(one, self.PROMPT)["adjustment"] == "auto-1"
            monkeypatch.setattr(auto, "IDLE", 0)
            self.ask(two, self.PROMPT)
            monkeypatch.setattr(auto, "IDLE", 600)
            assert self.ask(two, self.PROMPT)["drift"] == "novel"
            assert not watched[0].adjustments.names
            found = self.ask(one, self.PROMPT)
            assert (found["adjustment"], found["drift"]) == (None, None)
            fails(complete(one, prompt="The", adjustment="auto-1"), 400, "adjustment", "the server has none")

    def test_that_write_at_the_same_time_are_not_mixed_up(self, auto_running, monkeypatch):
        """The routing of each step is its own client's, however texts take turns."""
        found = {}

        class Recorded(Watch):
            def count(self, counts):
                found[self] = found.get(self, 0) + counts
                super().count(counts)

        monkeypatch.setattr(auto, "Watch", Recorded)
        monkeypatch.setattr(auto, "MIN_TOKENS", 10**6)
        with auto_running() as client:
            clients = [client() for _ in range(3)]
            for http in clients:
                self.ask(http)
            prompts = ["one", "and two", "this is three of them"]

            def ask(number):
                complete(clients[number], prompt=prompts[number], max_tokens=20 + 10 * number, temperature=0)

            found.clear()
            for number in range(3):
                ask(number)
            alone = found.copy()
            found.clear()
            threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert found.keys() == alone.keys()
            assert all(np.array_equal(found[watch], alone[watch]) for watch in alone)


def watch_of(folder, tokenizer):
    routing = read_routing(folder, open_checkpoint(folder).manifest.fingerprint)
    return Watch(DriftDetector(routing), Collected(tokenizer, MAX_TOKENS))


class TestKept:
    def test_are_few_and_dropped_when_nothing_is_written_with_them(self, made):
        model, tokenizer = moqa.load(made[0])
        loaded, python = LoadedAdjustments(model.adjustments), read_adjustment(made[1][0])
        watch = watch_of(made[0], tokenizer)

        def add(number):
            one = MadeAdjustment(f"auto-{number}", f"made-{number}", shares_of(0, model))
            loaded.add(python, one)
            watch.keep(one)
            del one
            loaded.drop_unused()

        add(0)
        writing = watch.kept["auto-0"]
        model.adjustments.switch(writing.held)
        for number in range(1, 7):
            add(number)
        assert list(watch.kept) == ["auto-3", "auto-4", "auto-5", "auto-6"]
        assert set(model.adjustments.names) == {f"made-{number}" for number in (0, 3, 4, 5, 6)}, "one is in use"
        del writing
        loaded.drop_unused()
        assert set(model.adjustments.names) == {f"made-{number}" for number in (3, 4, 5, 6)}
        assert model.adjustments.current is None

    def test_one_is_used_again_when_its_text_comes_back(self, made):
        model, tokenizer = moqa.load(made[0])
        watch = watch_of(made[0], tokenizer)
        collected = watch.collected
        for number in range(2):
            watch.keep(MadeAdjustment(f"auto-{number}", f"made-{number}", shares_of(number, model)))

        def meet(expert):
            for _ in range(40):
                watch.count((128 * shares_of(expert, model)).astype(np.int64))
                collected.take([5] * PART, last=False)
                watch.decide()
            return watch.default.name

        assert [meet(0), meet(1), meet(0)] == ["auto-0", "auto-1", "auto-0"]
        assert list(watch.kept) == ["auto-1", "auto-0"]
        assert not watch.lacks_one
        assert meet(2) is None
        assert watch.lacks_one, "text that is like neither"
        assert collected.shares == pytest.approx(shares_of(2, model), abs=0.1)


class TestCollected:
    def test_is_bounded_and_forgets(self, made):
        tokenizer = moqa.load(made[0])[1]
        collected = Collected(tokenizer, 3 * PART)
        collected.take([5] * (PART - 1), last=False)
        assert collected.tokens == 0
        for token in range(5, 11):
            text = [token] * PART
            collected.take(text, last=False)
            assert text == []
        assert collected.tokens == 3 * PART
        assert collected.texts() == [tokenizer.decode([token] * PART) for token in (8, 9, 10)]
        collected.take([7] * 9 * PART, last=True)
        assert collected.tokens == 3 * PART
        collected.clear()
        assert (collected.tokens, collected.texts()) == (0, [])


@pytest.mark.slow
def test_the_reference_model_is_adjusted_to_german_and_goes_back(tmp_path):
    from moqa.data import read_distributions

    def read(name, split):
        return read_distributions([f"{name}={REFERENCE / 'text' / f'{name}.{split}.txt'}"])[0]

    def prompts(name):
        text = read(name, "test").texts[0]
        return [text[at : at + 3000] for at in range(0, 45_000, 3000)]

    torch.set_num_threads(2)
    original = REFERENCE / "model"
    measured = moqa.profile(original, [read("novels", "calib")], tmp_path / "profile", samples=32, self_samples=4)
    planned = moqa.plan(measured, "3bpw")
    out = moqa.quantize(original, planned, tmp_path / "out", method="rtn", profile=measured, cache="full")
    model, tokenizer = moqa.load(out)
    with (
        running((model, tokenizer), adjusting=partial(AutoAdjusting, model, tokenizer, out)) as url,
        httpx.Client(base_url=url, timeout=PATIENCE) as http,
    ):
        complete(http, prompt="Hello", max_tokens=1)  # gets the cookie of a session, whose text is watched
        for prompt in prompts("novels")[:3]:
            found = complete(http, prompt=prompt, max_tokens=4, temperature=0).json()
            assert (found["adjustment"], found["drift"]) == (None, "known")
        end = time.monotonic() + PATIENCE
        while found["adjustment"] is None:
            assert time.monotonic() < end, gauges(http)
            for prompt in prompts("german"):
                found = complete(http, prompt=prompt, max_tokens=4, temperature=0).json()
                assert found["drift"] == "novel"
        assert found["adjustment"] == "auto-1"
        shown = gauges(http)
        assert (shown["moqa_drift_state",], shown["moqa_adjustments",]) == (2, 1)
        for prompt in prompts("novels")[:3]:
            found = complete(http, prompt=prompt, max_tokens=4, temperature=0).json()
        assert (found["adjustment"], found["drift"]) == (None, "known")
        assert json.loads((out / ROUTING).read_text())["known"].keys() == {"novels"}
        assert isinstance(read("german", "test"), Distribution)
