"""The server, as clients see it: a real one on a free port, asked by OpenAI's client and by hostile ones."""

import asyncio
import json
import logging

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import GREEDY, LONG, PATIENCE, alone, asked, complete, fails, gauges, running, until

from moqa.generation import Sampling, generate
from moqa.serve.bodies import body_limit


class TestAnswers:
    def test_completion(self, client, tiny):
        found = client.completions.create(model="tiny", prompt="The history of", **GREEDY)
        text, finish = alone(tiny, "The history of", **GREEDY)
        assert (found.object, found.model, found.choices[0].text) == ("text_completion", "tiny", text)
        assert found.choices[0].finish_reason == finish.finish_reason == "length"
        assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (3, 12, 15)

    def test_streamed_completion(self, client, tiny):
        options = {"prompt": "The history of", "seed": 3, "max_tokens": 12}
        chunks = list(client.completions.create(model="tiny", stream=True, **options))
        text, _ = alone(tiny, options.pop("prompt"), **options)
        assert "".join(chunk.choices[0].text for chunk in chunks) == text
        assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
        assert all(chunk.usage is None for chunk in chunks)

    def test_several_prompts(self, client, tiny):
        prompts = ["The", "A", "In"]
        found = client.completions.create(model="tiny", prompt=prompts, **GREEDY)
        expected = [alone(tiny, prompt, **GREEDY)[0] for prompt in prompts]
        assert [choice.text for choice in found.choices] == expected
        assert found.usage.completion_tokens == 36
        ids = [tiny[1](prompt)["input_ids"] for prompt in prompts]
        assert [c.text for c in client.completions.create(model="tiny", prompt=ids, **GREEDY).choices] == expected
        assert client.completions.create(model="tiny", prompt=ids[0], **GREEDY).choices[0].text == expected[0]
        texts = ["", "", ""]
        for chunk in client.completions.create(model="tiny", prompt=prompts, stream=True, **GREEDY):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == expected

    def test_usage_of_a_stream(self, client):
        options = {"include_usage": True}
        *chunks, last = client.completions.create(
            model="tiny", prompt="The", stream=True, stream_options=options, **GREEDY
        )
        assert all(chunk.usage is None for chunk in chunks)
        assert last.choices == []
        assert last.usage.completion_tokens == 12

    def test_chat(self, client, tiny):
        messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
        found = client.chat.completions.create(model="tiny", messages=messages, **GREEDY)
        expected, finish = alone(tiny, "system: Be brief.\nuser: Hello\nassistant:", stop=("\nuser:",), **GREEDY)
        assert found.choices[0].message.content == expected
        assert found.choices[0].message.role == "assistant"
        assert found.usage.prompt_tokens == finish.prompt_tokens
        parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
        again = client.chat.completions.create(model="tiny", messages=[messages[0], *parts], **GREEDY)
        assert again.choices[0].message.content == expected
        history = [*messages, found.choices[0].message, {"role": "user", "content": "And?"}]
        assert client.chat.completions.create(model="tiny", messages=history, **GREEDY).usage.prompt_tokens > 20

    def test_streamed_chat(self, client):
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "seed": 1}
        whole = client.chat.completions.create(max_completion_tokens=12, **asked)
        first, *chunks = client.chat.completions.create(max_tokens=12, stream=True, **asked)
        assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
        assert chunks[-1].choices[0].finish_reason == "length"

    def test_stop_strings(self, client, tiny):
        text, _ = alone(tiny, "The", **GREEDY)
        for stop in (text[5:8], ["never there", text[5:8]]):
            found = client.completions.create(model="tiny", prompt="The", stop=stop, **GREEDY).choices[0]
            assert (found.text, found.finish_reason) == (text[: text.index(text[5:8])], "stop")

    def test_logprobs(self, client, tiny):
        pieces = list(generate(*tiny, "The", Sampling(logprobs=3, seed=1, max_tokens=12)))
        expected = [token for piece in pieces for token, _ in piece.tokens]
        asked = {"model": "tiny", "seed": 1, "max_tokens": 12}
        report = client.completions.create(prompt="The", logprobs=3, **asked).choices[0].logprobs
        assert report.token_logprobs == [token.logprob for token in expected]
        assert report.tokens == [tiny[1].decode([token.id]) for token in expected]
        assert report.text_offset == [at for piece in pieces for _, at in piece.tokens]
        assert [max(top.values()) for top in report.top_logprobs] == [token.top[0][1] for token in expected]
        asked |= {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True}
        whole = client.chat.completions.create(top_logprobs=3, **asked).choices[0].logprobs.content
        chunks = client.chat.completions.create(stream=True, **asked)
        streamed = [entry for chunk in chunks for entry in chunk.choices[0].logprobs.content]
        assert [(e.token, e.logprob) for e in streamed] == [(e.token, e.logprob) for e in whole]
        assert [len(entry.top_logprobs) for entry in whole] == [3] * 12
        assert all(bytes(e.bytes).decode() == e.token for e in whole if e.bytes is not None)

    def test_models(self, client):
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").object == "model"
        with pytest.raises(openai.NotFoundError) as error:
            client.completions.create(model="gpt", prompt="The")
        assert error.value.code == "model_not_found"


class TestLoad:
    def test_loses_no_request_and_changes_no_text(self, tiny, url):
        options = [{"prompt": f"The {n}", "seed": n, "max_tokens": 4 + n % 9} for n in range(200)]
        expected = [alone(tiny, **one)[0] for one in options]

        async def ask():
            limits = httpx.Limits(max_connections=200)
            async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as client:
                return await asyncio.gather(*(client.post("/v1/completions", json=one) for one in options))

        found = asyncio.run(ask())
        assert [response.status_code for response in found] == [200] * 200
        assert [response.json()["choices"][0]["text"] for response in found] == expected

    def test_takes_turns(self, http, url):
        with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as long:
            lines = long.iter_lines()  # closes the connection when it is forgotten
            assert next(lines)
            assert complete(http, prompt="A", **GREEDY).status_code == 200
            until(http, active_slots=1)  # the long one is still written
        until(http, active_slots=0)

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_leaves_frees_its_slot(self, http, url, stream):
        with asked(url, **{**LONG, "stream": stream, "prompt": ["The", "A"]}):
            until(http, active_slots=2)
            written = gauges(http)["moqa_completion_tokens_total",]
        until(http, active_slots=0)
        assert gauges(http)["moqa_completion_tokens_total",] - written < LONG["max_tokens"], "they were cut"

    def test_a_client_that_leaves_frees_its_place_in_the_queue(self, tiny):
        with running(tiny, slots=1, queue=1) as url, httpx.Client(base_url=url, timeout=PATIENCE) as http:
            with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as active:
                lines = active.iter_lines()  # closes the connection when it is forgotten
                assert next(lines)
                with asked(url, **LONG):
                    until(http, queue_length=1, active_slots=1)
                until(http, queue_length=0)
                assert gauges(http)["moqa_active_slots",] == 1, "the other one is still written"
            until(http, active_slots=0)
            assert gauges(http)["moqa_completion_tokens_total",] < LONG["max_tokens"], "it was cut"

    def test_a_full_queue_is_a_429(self, tiny):
        with running(tiny, slots=1, queue=1) as url, httpx.Client(base_url=url, timeout=PATIENCE) as http:
            fails(complete(http, **{**LONG, "prompt": ["a", "b", "c"]}), 400, "prompt", "at most 2")
            with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as active:
                lines = active.iter_lines()  # closes the connection when it is forgotten
                assert next(lines)
                refused = complete(http, **{**LONG, "prompt": ["a", "b"]})
                fails(refused, 429, word="try again later")
                assert int(refused.headers["retry-after"]) > 0
                assert gauges(http)["moqa_queue_length",] == 0, "all texts of a request or none"
            until(http, active_slots=0)
            assert complete(http, prompt=["a", "b"], **GREEDY).status_code == 200


CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "param", "word"),
        [
            ({}, "prompt", "missing"),
            ({"prompt": 5}, "prompt", "a list of texts"),
            ({"prompt": []}, "prompt", "none of them empty"),
            ({"prompt": [1, True]}, "prompt", "token numbers"),
            ({"prompt": ""}, None, "no tokens"),
            ({"prompt": [8192]}, None, "8192"),
            ({"prompt": "a", "max_tokens": 40000}, None, "40001"),
            ({"prompt": [5] * 32768}, None, "context"),
            ({"prompt": "a", "max_tokens": "8"}, "max_tokens", "integer"),
            ({"prompt": "a", "max_tokens": 0}, "max_tokens", "greater"),
            ({"prompt": "a", "temperature": 3}, "temperature", "less than or equal to 2"),
            ({"prompt": "a", "seed": 2**70}, "seed", "less"),
            ({"prompt": "a", "stop": [""]}, "stop", "1 character"),
            ({"prompt": "a", "stop": 5}, "stop", "a list of texts"),
            ({"prompt": "a", "n": 0}, "n", "greater"),
            ({"prompt": "a", "n": 3, "best_of": 2}, "best_of", "less than n 3"),
            ({"prompt": "a", "best_of": 2, "stream": True}, "best_of", "streamed"),
            ({"prompt": ["a", "b"], "n": 128, "best_of": 128, "max_tokens": 1, "echo": 1}, "echo", "boolean"),
            ({"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
            ({"prompt": "a", "temprature": 1}, "temprature", "did you mean temperature?"),
            ({"prompt": "a", "min_p": 2}, "min_p", "less than or equal to 1"),
            ({"prompt": "a", "logit_bias": {"8192": 1}}, None, "logit_bias has token 8192"),
            ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "integer"),
            ({"prompt": "a", "frequency_penalty": 3}, "frequency_penalty", "less than or equal to 2"),
            ({"prompt": "a", "grammar": "start: nothing"}, None, "grammar"),
            ({"prompt": "a", "response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
            ({"prompt": "a", "response_format": {"type": "json_object", "schema": {"type": 5}}}, None, "grammar"),
            ({"prompt": "a", "stream_options": 5}, "stream_options", "valid"),
        ],
    )
    def test_of_completions(self, http, body, param, word):
        fails(complete(http, **body), 400, param, word)

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"messages": []}, "messages"),
            ({"messages": [{"role": "king", "content": "a"}]}, "messages"),
            ({"messages": [{"role": "user"}]}, "messages"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
            ({**CHAT, "top_logprobs": 2}, "top_logprobs"),
            ({**CHAT, "tools": [{"type": "function"}]}, "tools"),
        ],
    )
    def test_of_chats(self, http, body, param):
        fails(http.post("/v1/chat/completions", json=body), 400, param)

    def test_what_changes_nothing_is_taken(self, http):
        neutral = {"n": 1, "echo": False, "presence_penalty": 0, "logit_bias": None, "user": "me", "tools": []}
        assert complete(http, prompt="a", **GREEDY, **neutral).status_code == 200

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"prompt": NaN}'])
    def test_of_what_is_no_request(self, http, content):
        kind = {"content-type": "application/json"}
        fails(
            http.post("/v1/completions", content=content, headers=kind), 400, *(["prompt"] if b"NaN" in content else [])
        )

    def test_of_other_content(self, http):
        fails(http.post("/v1/completions", content=b"prompt=a"), 400, word="application/json")

    def test_of_too_much(self, http, tiny):
        limit = body_limit(tiny[0].config.max_position_embeddings)
        fails(complete(http, prompt="a" * limit), 413)
        kind = {"content-type": "application/json"}
        chunks = (b" " * 2**16 for _ in range(limit // 2**16 + 2))
        fails(http.post("/v1/completions", content=chunks, headers=kind), 413)
        assert http.get("/health").json() == {"status": "ok"}

    def test_of_other_routes(self, http):
        fails(http.get("/nothing"), 404)
        fails(http.get("/v1/completions"), 405)
        fails(http.post("/health"), 405)

    json_values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    )
    fields = st.sampled_from(
        ["prompt", "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "logprobs", "n", "model"]
    )

    @settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
    @given(st.dictionaries(fields | st.text(max_size=4), json_values, max_size=4), st.sampled_from(["", "chat/"]))
    def test_of_anything(self, http, body, kind):
        body = {"max_tokens": 2, **body}
        content = json.dumps(body).encode()
        response = http.post(f"/v1/{kind}completions", content=content, headers={"content-type": "application/json"})
        assert response.status_code in (200, 400, 404)
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    @settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
    @given(st.binary(max_size=60))
    def test_of_any_bytes(self, http, content):
        fails(http.post("/v1/completions", content=content, headers={"content-type": "application/json"}), 400)

    def test_afterwards_it_still_serves(self, http, client):
        until(http, active_slots=0, queue_length=0)
        assert client.completions.create(model="tiny", prompt="The", **GREEDY).usage.completion_tokens == 12


class TestFailures:
    def test_of_one_text_leave_the_others_alone(self, tiny, caplog):
        secret = "something"

        def breaks(begin):
            def broken(job):
                for count, piece in enumerate(begin(job)):
                    if job.ids[0] == 5 and count == job.ids[1]:
                        raise RuntimeError(secret)
                    yield piece

            return broken

        with (
            running(tiny, begin=breaks) as url,
            httpx.Client(base_url=url, timeout=PATIENCE) as http,
            caplog.at_level(logging.ERROR),
        ):
            with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as other:
                lines = other.iter_lines()
                assert next(lines)
                for stream in (False, True):
                    fails(complete(http, prompt=[5, 0], stream=stream), 500)
                later = complete(http, prompt=[5, 3], stream=True)
                events = [json.loads(line[6:]) for line in later.text.splitlines() if line]
                assert [event["error"]["type"] for event in events if "error" in event] == ["server_error"]
                assert "[DONE]" not in later.text
                assert next(line for line in lines if line)
            until(http, active_slots=0)
            assert complete(http, prompt=[6, 0], **GREEDY).status_code == 200
        assert "RuntimeError" in caplog.text
        assert "broken" in caplog.text, "the log says where"
        assert secret not in caplog.text

    def test_nothing_of_a_prompt_is_logged(self, http, caplog):
        with caplog.at_level(logging.DEBUG, logger="moqa"), caplog.at_level(logging.INFO, logger="uvicorn"):
            complete(http, prompt="my secret", **GREEDY)
            complete(http, prompt="my secret", temperature="my secret")
        assert "secret" not in caplog.text


class TestKeys:
    def test_are_asked_for(self, tiny):
        with running(tiny, keys=["right ü"]) as url, httpx.Client(base_url=url, timeout=PATIENCE) as http:
            for header in (None, "Bearer wrong", "right ü", "Bearer right"):
                headers = {"authorization": header.encode()} if header else {}
                fails(http.get("/v1/models", headers=headers), 401, word="Authorization")
                fails(http.post("/v1/completions", content=b"{", headers=headers), 401)
            right = {"authorization": "Bearer right ü".encode()}
            assert http.get("/v1/models", headers=right).status_code == 200
            assert http.get("/health").status_code == 200
            page = http.get("/metrics", headers=right).text
            assert 'moqa_requests_total{route="/v1/models",status="401"} 4.0' in page


class TestMetrics:
    def test_count_what_happened(self, tiny):
        with running(tiny, slots=3) as url, httpx.Client(base_url=url, timeout=PATIENCE) as http:
            complete(http, prompt="The history of", **GREEDY)
            complete(http, prompt=["A", "In"], stream=True, **GREEDY)
            complete(http, prompt=7)
            http.get("/nowhere/1"), http.get("/nowhere/2")
            found = gauges(http)
        assert found["moqa_requests_total", "/v1/completions", "200"] == 2
        assert found["moqa_requests_total", "/v1/completions", "400"] == 1
        assert found["moqa_requests_total", "other", "404"] == 2
        assert found["moqa_prompt_tokens_total",] == 5
        assert found["moqa_completion_tokens_total",] == 36
        assert found["moqa_time_to_first_token_seconds_count",] == 3
        assert found["moqa_time_per_token_seconds_count",] == 33
        assert found["moqa_slots",] == 3
        assert found["moqa_queue_length",] == found["moqa_active_slots",] == 0
        assert found["moqa_busy_seconds_total", "decode"] > 0 < found["moqa_busy_seconds_total", "prefill"]
