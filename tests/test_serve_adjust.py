"""The server with adjustments: chosen by requests, and made by itself when text is novel."""

import threading
from functools import partial

import httpx
import openai
import pytest
from serving import PATIENCE, alone, complete, fails, gauges, running

import moqa
from moqa.cli.main import main
from moqa.errors import MoqaError
from moqa.format.routing import ROUTING
from moqa.serve.adjusting import Adjusting

WRITE = {"seed": 3, "max_tokens": 24}


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
            found = complete(http, prompt="The", **WRITE)
            assert found.json()["adjustment"] is None
            assert "set-cookie" not in found.headers
            fails(complete(http, prompt="The", adjustment="python"), 400, "adjustment", "the server has none")


class TestMistakesAtTheStart:
    @pytest.mark.parametrize(
        ("options", "word"),
        [
            (["--adjust", "nowhere"], "nowhere"),
            (["--adjust", "auto", "--adjust", "off"], "give auto, off, or adjustment folders"),
            (["--adjust-shared"], "--adjust auto"),
            (["--cors", "page.example"], "--cors page.example is not an origin"),
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
