"""What today's clients send: several answers, echoes, formats, template variables, unknown fields, a browser's key."""

import base64
import json

import httpx
import pytest
from serving import GREEDY, PATIENCE, alone, complete, fails, running

from moqa.generation import load_any

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}{{ m.name or '' }}>{{ m.reasoning_content or '' }}{{ m.content }}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}"
)
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return load_any(tiny_model)


@pytest.fixture(scope="module")
def templated(tiny_model):
    model, tokenizer = load_any(tiny_model)
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


@pytest.fixture(scope="module")
def url(templated):
    with running(templated) as address:
        yield address


def prompt_of(http, **body):
    """What a conversation becomes."""
    tokens = http.post("/tokenize", json=body).json()["tokens"]
    return http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]


class TestChoices:
    def test_are_as_many_as_asked_for(self, client, tiny):
        asked = {"model": "tiny", "prompt": ["The", "A"], "n": 3, "seed": 5, "max_tokens": 8}
        found = client.completions.create(**asked)
        expected = [alone(tiny, p, seed=5 + n, max_tokens=8)[0] for p in ("The", "A") for n in range(3)]
        assert [choice.text for choice in found.choices] == expected
        assert [choice.index for choice in found.choices] == list(range(6))
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (2, 48)
        texts = [""] * 6
        for chunk in client.completions.create(stream=True, **asked):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == expected

    def test_are_the_likeliest_of_more(self, client):
        asked = {"model": "tiny", "prompt": "The", "seed": 5, "max_tokens": 8}
        several = client.completions.create(n=6, logprobs=0, **asked).choices
        best = sorted(several, key=lambda choice: -sum(choice.logprobs.token_logprobs))[:2]
        found = client.completions.create(n=2, best_of=6, **asked)
        assert [choice.text for choice in found.choices] == [choice.text for choice in best]
        assert found.choices[0].logprobs is None
        assert found.usage.completion_tokens == 48, "what was written counts"

    def test_of_a_chat(self, client):
        found = client.chat.completions.create(model="tiny", messages=[USER], n=2, seed=1, max_tokens=6)
        assert len({choice.message.content for choice in found.choices}) == 2

    def test_must_fit(self, tiny):
        with running(tiny, slots=1, queue=2) as url, httpx.Client(base_url=url, timeout=PATIENCE) as http:
            fails(complete(http, prompt="a", n=4), 400, "n", "at most 3")


class TestEcho:
    def test_has_what_evaluation_harnesses_read(self, http, tiny):
        prompts = [[599, 3523, 298], [5, 6, 7, 8, 9]]
        body = {"prompt": prompts, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
        for choice, prompt in zip(complete(http, **body).json()["choices"], prompts, strict=True):
            report = choice["logprobs"]
            assert len(report["token_logprobs"]) == len(report["top_logprobs"]) == len(prompt) + 1
            assert report["token_logprobs"][0] is report["top_logprobs"][0] is None
            assert report["tokens"][:-1] == [tiny[1].decode([token]) for token in prompt]
            for value, top in zip(report["token_logprobs"][1:], report["top_logprobs"][1:], strict=True):
                assert value <= max(top.values())
            greedy = report["token_logprobs"][-1]
            assert greedy == max(report["top_logprobs"][-1].values())
            assert choice["text"].startswith(tiny[1].decode(prompt))

    def test_has_one_token_more_even_if_that_ends_the_text(self, http):
        report = complete(http, prompt=[5, 6], max_tokens=1, logprobs=1, echo=True, logit_bias={"0": 100}).json()
        assert len(report["choices"][0]["logprobs"]["tokens"]) == 3
        assert report["choices"][0]["finish_reason"] == "stop"

    def test_of_nothing_else(self, http):
        found = complete(http, prompt="The history", max_tokens=0, echo=True, logprobs=0).json()
        assert found["choices"][0]["text"] == "The history"
        assert (found["usage"]["prompt_tokens"], found["usage"]["completion_tokens"]) == (2, 0)
        streamed = complete(http, prompt="The history", max_tokens=0, echo=True, stream=True).text
        assert "The history" in streamed
        assert "[DONE]" in streamed


class TestFormats:
    @pytest.mark.parametrize(
        "format",
        [
            {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
            {"type": "json_object", "schema": SCHEMA},
        ],
    )
    def test_are_followed(self, client, format):
        asked = {"model": "tiny", "messages": [USER], "seed": 2, "max_tokens": 100, "response_format": format}
        found = client.chat.completions.create(**asked).choices[0]
        assert set(json.loads(found.message.content)) == {"a"}
        assert found.finish_reason == "stop"

    def test_of_any_json(self, http):
        body = {"prompt": "a", "max_tokens": 60, "response_format": {"type": "json_object"}, "logit_bias": {}}
        assert complete(http, **body).json()["choices"][0]["text"].lstrip().startswith("{")
        body["response_format"] = {"type": "text"}
        assert complete(http, **body).status_code == 200

    def test_may_be_a_grammar(self, http):
        assert complete(http, prompt="a", grammar='root ::= "x" [0-9]').json()["choices"][0]["text"][0] == "x"
        both = {"grammar": 'root ::= "x"', "response_format": {"type": "json_object"}}
        fails(complete(http, prompt="a", **both), 400, "grammar", "cannot be combined")


class TestConversations:
    def test_say_all_that_a_template_can(self, http):
        messages = [
            {**USER, "name": "bob"},
            {"role": "assistant", "content": None, "reasoning_content": "hm", "id": 7},
            {"role": "assistant", "content": None},
            {"role": "tool", "content": [{"type": "text", "text": "21"}], "tool_call_id": "a"},
        ]
        assert prompt_of(http, messages=messages) == "<userbob>Hi<assistant>hm<assistant><tool>21"

    def test_set_variables(self, http):
        options = {"chat_template_kwargs": {"enable_thinking": False}}
        assert prompt_of(http, messages=[USER], **options) == "<user>Hi<no>"
        for more in (options, {"reasoning_effort": "none"}):
            found = http.post("/v1/chat/completions", json={"messages": [USER], "max_tokens": 1, **more})
            plain = http.post("/v1/chat/completions", json={"messages": [USER], "max_tokens": 1})
            assert "x-moqa-ignored" not in found.headers
            assert found.json()["usage"]["prompt_tokens"] > plain.json()["usage"]["prompt_tokens"]

    @pytest.mark.parametrize(
        "name", ["chat_template", "tokenize", "add_generation_prompt", "messages", "conversations"]
    )
    def test_set_nothing_else(self, http, name):
        body = {"messages": [USER], "chat_template_kwargs": {name: "{{ 7 }}"}}
        fails(http.post("/v1/chat/completions", json=body), 400)

    def test_have_a_content(self, http):
        fails(
            http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": None}]}), 400, "messages"
        )


class TestFields:
    def test_that_nobody_knows_are_named_in_a_header(self, http):
        body = {"prompt": "a", **GREEDY, "session_id": 5, "späti\r\nx": 1, "stream_options": {"why": 1}, "user": "me"}
        found = complete(http, **body)
        assert found.status_code == 200
        assert set(found.headers["x-moqa-ignored"].split(", ")) == {"session_id", "sp?ti??x", "stream_options.why"}
        assert complete(http, **{**body, "stream": True}).headers["x-moqa-ignored"]
        assert "x-moqa-ignored" not in complete(http, prompt="a", user="me", **GREEDY).headers

    def test_that_the_template_does_not_read_are_named_too(self, http):
        body = {
            "messages": [{**USER, "id": 1}],
            "max_tokens": 1,
            "reasoning_effort": "low",
            "chat_template_kwargs": {"x_y": 1},
        }
        found = http.post("/v1/chat/completions", json=body).headers["x-moqa-ignored"]
        assert set(found.split(", ")) == {"messages.id", "reasoning_effort", "chat_template_kwargs.x_y"}

    @pytest.mark.parametrize(
        "field", [{"min_tokens": 5}, {"ignore_eos": True}, {"best_off": 2}, {"top_a": 0.5}, {"stops": []}]
    )
    def test_that_would_change_the_answer_are_refused(self, http, field):
        fails(complete(http, prompt="a", **field), 400, next(iter(field)), "not supported")

    def test_are_not_too_many(self, http):
        assert complete(http, prompt="a", **{f"f{n}": n for n in range(101)}).status_code == 400


class TestNames:
    def test_may_be_several(self, tiny):
        with running(tiny, names=["gpt-4o", "tiny"]) as url, httpx.Client(base_url=url, timeout=PATIENCE) as http:
            assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["gpt-4o", "tiny"]
            assert http.get("/v1/models/tiny").json()["id"] == "tiny"
            for name in ("gpt-4o", "tiny"):
                assert complete(http, prompt="a", model=name, **GREEDY).json()["model"] == "gpt-4o"
            fails(complete(http, prompt="a", model="gpt"), 404, "model", "gpt-4o or tiny")


class TestTokenizer:
    def test_shows_tokens_and_text(self, http, tiny):
        found = http.post("/tokenize", json={"prompt": "The history of", "return_token_strs": True}).json()
        assert (found["tokens"], found["count"], found["max_model_len"]) == ([599, 3523, 298], 3, 32768)
        assert len(found["token_strs"]) == 3
        assert http.post("/detokenize", json={"tokens": [599, 3523]}).json() == {"prompt": tiny[1].decode([599, 3523])}
        about = http.get("/tokenizer_info").json()
        assert (about["eos_token"], about["chat_template"]) == ("<|endoftext|>", TEMPLATE)

    @pytest.mark.parametrize(
        ("route", "body"),
        [
            ("tokenize", {}),
            ("tokenize", {"prompt": "a", "messages": [USER]}),
            ("tokenize", {"prompt": "a", "model": "gpt"}),
            ("detokenize", {"tokens": [8192]}),
            ("detokenize", {"tokens": [-1]}),
            ("detokenize", {"tokens": "a"}),
        ],
    )
    def test_refuses_what_it_cannot_show(self, http, route, body):
        response = http.post(f"/{route}", json=body)
        assert response.status_code in (400, 404)
        assert response.json()["error"]["message"]


class TestPage:
    def test_is_one_file_that_asks_nobody_else(self, http):
        page = http.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "//" not in page.text.replace("// the browser", "")

    def test_opens_with_the_key_as_a_browser_sends_it(self, tiny):
        with running(tiny, keys=["right"]) as url, httpx.Client(base_url=url, timeout=PATIENCE) as http:
            asks = http.get("/")
            fails(asks, 401)
            assert asks.headers["www-authenticate"].startswith("Basic")
            basic = {"authorization": "Basic " + base64.b64encode(b"me:right").decode()}
            for headers in (basic, {"authorization": "Bearer right"}):
                assert http.get("/", headers=headers).status_code == 200
                assert http.get("/v1/models", headers=headers).status_code == 200
            for wrong in ("Basic !", "Basic " + base64.b64encode(b"right").decode(), "Basic", "Digest right"):
                fails(http.get("/", headers={"authorization": wrong}), 401)
            for origin, status in (("http://evil.example", 401), (url, 200)):
                assert http.get("/v1/models", headers={**basic, "origin": origin}).status_code == status
            for route in ("/tokenize", "/detokenize"):
                fails(http.post(route, json={}), 401)
