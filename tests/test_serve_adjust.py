"""The server with adjustments: chosen by requests, and made by itself when text is novel."""

import json
import logging
import threading
import time
from functools import partial

import httpx
import numpy as np
import openai
import pytest
import torch
from conftest import REFERENCE
from serving import GREEDY, PATIENCE, alone, complete, fails, gauges, running

import moqa
from moqa.adjustment import adjust
from moqa.adjustment.drift import DriftDetector
from moqa.cli.main import main
from moqa.data import Distribution
from moqa.errors import MoqaError
from moqa.format.adjustment import read_adjustment
from moqa.format.reader import open_checkpoint
from moqa.format.routing import ROUTING, read_routing
from moqa.runtime.routing import RoutingCounts
from moqa.serve import auto
from moqa.serve.adjusting import Adjusting
from moqa.serve.auto import MAX_TOKENS, AutoAdjusting
from moqa.serve.collected import PART, Collected
from moqa.serve.kept import KeptAdjustments, MadeAdjustment
from moqa.serve.watch import Watch

SHARE = "30%"  # of a tiny random model; less changes too little
WRITE = {"seed": 3, "max_tokens": 24}


@pytest.fixture(scope="module")
def made(tiny_model, texts, tmp_path_factory):
    """A checkpoint with a cache, known on wiki, and two adjustments."""
    folder = tmp_path_factory.mktemp("adjusted")
    measured = moqa.profile(tiny_model, [texts["wiki"]], folder / "profile", samples=4, context=32, self_samples=1)
    planned = moqa.plan(measured, None, strategy="uniform", widths=(2,))
    out = moqa.quantize(tiny_model, planned, folder / "out", method="rtn", profile=measured, cache="full")
    for name in ("python", "novels"):
        adjust(out, [texts[name]], folder / name, samples=8, budget=SHARE)
    return out, [folder / "python", folder / "novels"]


@pytest.fixture(scope="module")
def loaded(made):
    return moqa.load(made[0])


def expected(loaded, name, prompt, **options):
    """What the model writes alone with an adjustment."""
    model, tokenizer = loaded
    model.adjustments.switch(name)
    try:
        return alone((model, tokenizer), prompt, **options)[0]
    finally:
        model.adjustments.switch(None)


@pytest.fixture(scope="module")
def url(made):
    model, tokenizer = moqa.load(made[0])
    with running((model, tokenizer), adjusting=partial(Adjusting, model, folders=made[1])) as address:
        yield address


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="module")
def answers(made, loaded):
    """Of each adjustment, what is written alone; they differ, or the tests would show nothing."""
    for folder in made[1]:
        loaded[0].adjustments.hold(folder)
    found = {name: expected(loaded, name, "The history of", **WRITE) for name in (None, "python", "novels")}
    assert len(set(found.values())) == 3
    return found


class TestChoice:
    @pytest.mark.parametrize("name", [None, "python", "novels"])
    def test_is_the_requests(self, http, answers, name):
        found = complete(http, prompt="The history of", adjustment=name, **WRITE).json()
        assert found["choices"][0]["text"] == answers[name]
        assert (found["adjustment"], found["drift"]) == (name, None)

    def test_is_the_first_without_one(self, http, answers):
        found = complete(http, prompt="The history of", **WRITE).json()
        assert (found["choices"][0]["text"], found["adjustment"]) == (answers["python"], "python")

    def test_holds_for_chats_and_streams(self, url, http, loaded):
        messages = [{"role": "user", "content": "Hello"}]
        want = expected(loaded, "novels", "user: Hello\nassistant:", stop=("\nuser:",), **WRITE)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            ask = partial(client.chat.completions.create, model="tiny", messages=messages, **WRITE)
            whole = ask(extra_body={"adjustment": "novels"})
            assert (whole.choices[0].message.content, whole.model_extra["adjustment"]) == (want, "novels")
            for options in ({}, {"stream_options": {"include_usage": True}}):
                chunks = list(ask(stream=True, extra_body={"adjustment": "novels"}, **options))
                assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == want
                assert chunks[-1].model_extra["adjustment"] == "novels"
                assert chunks[-1].model_extra["drift"] is None
                assert not any("adjustment" in chunk.model_extra for chunk in chunks[:-1])

    def test_of_one_request_changes_no_other_that_is_written_beside_it(self, http, loaded, answers):
        names = [None, "python", "novels"]
        asked = [(names[n % 3], {"prompt": f"The {n}", "seed": n, "max_tokens": 5 + n % 7}) for n in range(24)]
        want = [expected(loaded, name, **options) for name, options in asked]
        found = [None] * len(asked)

        def ask(number):
            name, options = asked[number]
            found[number] = complete(http, adjustment=name, **options).json()["choices"][0]["text"]

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == want

    def test_of_none_that_is_held_is_a_400(self, http):
        fails(complete(http, prompt="The", adjustment="german"), 400, "adjustment", "python, novels")
        fails(complete(http, prompt="The", adjustment=5), 400, "adjustment", "string")

    def test_is_counted(self, http):
        before = gauges(http)
        complete(http, prompt="The", adjustment=None, **WRITE)
        complete(http, prompt="The", **WRITE)
        after = gauges(http)
        for label in ("(none)", "python"):
            key = ("moqa_adjusted_requests_total", label)
            assert after[key] == before.get(key, 0) + 1
        assert after["moqa_adjustments",] == 2
        assert ("moqa_drift_state",) not in after

    def test_of_a_model_without_any(self, tiny_model):
        with running(moqa.generation.load_any(tiny_model)) as url, httpx.Client(base_url=url, timeout=PATIENCE) as http:
            assert complete(http, prompt="The", **WRITE).json()["adjustment"] is None
            fails(complete(http, prompt="The", adjustment="python"), 400, "adjustment", "the server has none")


class TestMistakesAtTheStart:
    @pytest.mark.parametrize(
        ("options", "word"),
        [
            (["--adjust", "nowhere"], "nowhere"),
            (["--adjust", "auto", "--adjust", "off"], "give auto, off, or adjustment folders"),
        ],
    )
    def test_are_one_line(self, made, capsys, monkeypatch, options, word):
        monkeypatch.setattr("sys.argv", ["moqa", "serve", str(made[0]), "--port", "0", *options])
        with pytest.raises(SystemExit) as exit:
            main()
        assert exit.value.code == 2
        error = capsys.readouterr().err
        assert word in error
        assert error.count("\n") <= 2

    def test_an_original_has_none(self, tiny_model, made):
        for options in (["auto"], made[1]):
            with pytest.raises(MoqaError, match="needs a checkpoint"):
                moqa.serve.serve(tiny_model, port=0, adjust=options)

    @pytest.mark.parametrize(("part", "word"), [("cache", "no channel cache"), (ROUTING, ROUTING)])
    def test_auto_needs_a_cache_and_the_known_routing(self, made, tmp_path, part, word):
        for path in made[0].iterdir():
            if path.name != part:
                (tmp_path / path.name).symlink_to(path)
        with pytest.raises(MoqaError, match=word):
            moqa.serve.serve(tmp_path, port=0, adjust=["auto"])


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
            first = complete(http, **ask).json()
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


class TestKept:
    def test_are_few_and_dropped_when_nothing_is_written_with_them(self, made):
        model, _ = moqa.load(made[0])
        kept, python = KeptAdjustments(model.adjustments), read_adjustment(made[1][0])

        def add(number):
            kept.add(python, MadeAdjustment(f"auto-{number}", shares_of(0, model)))

        add(0)
        writing = kept.find("auto-0")
        for number in range(1, 7):
            add(number)
        assert kept.names == ["auto-3", "auto-4", "auto-5", "auto-6"]
        assert set(model.adjustments.names) == {writing.name, *kept.names}, "one is still written with"
        del writing
        add(7)
        assert set(model.adjustments.names) == set(kept.names)

    def test_one_is_used_again_when_its_text_comes_back(self, made):
        model, tokenizer = moqa.load(made[0])
        kept, collected = KeptAdjustments(model.adjustments), Collected(tokenizer, MAX_TOKENS)
        detector = DriftDetector(read_routing(made[0], open_checkpoint(made[0]).manifest.fingerprint))
        watch = Watch(detector, collected, kept)
        for number, folder in enumerate(made[1]):
            kept.add(read_adjustment(folder), MadeAdjustment(f"auto-{number}", shares_of(number, model)))

        def meet(expert):
            for _ in range(40):
                watch.count((128 * shares_of(expert, model)).astype(np.int64))
                collected.take([5] * PART, last=False)
                watch.decide()
            return watch.default.name

        assert [meet(0), meet(1), meet(0)] == ["auto-0", "auto-1", "auto-0"]
        assert kept.names == ["auto-1", "auto-0"]
        assert not watch.lacks_one
        assert meet(2) is None
        assert watch.lacks_one, "text that is like neither"
        assert collected.shares == pytest.approx(shares_of(2, model), abs=0.1)


class TestCollected:
    def test_is_bounded_and_forgets(self, loaded):
        tokenizer = loaded[1]
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
