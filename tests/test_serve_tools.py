"""Tools: how models write calls, in whole answers and in pieces, and calls that are asked for."""

import json

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import PATIENCE, fails, running

from moqa.generation import Piece, load_any
from moqa.generation.run import Finish
from moqa.serve.answers import ChatAnswer
from moqa.serve.said import Said
from moqa.serve.tools import forced_grammar, reader_of

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather", "description": "Weather of a day",
        "parameters": {
            "type": "object", "properties": {"city": {"type": "string"}, "day": {"$ref": "#/$defs/day"}},
            "required": ["city", "day"], "additionalProperties": False, "$defs": {"day": {"type": "integer"}},
        },
    },
}  # fmt: skip
NOW = {"type": "function", "function": {"name": "now"}}
ARGUMENTS = {"city": "Köln 7", "day": 7}
AS_JSON = json.dumps(ARGUMENTS, ensure_ascii=False)
# a template with the mark of a format, what a model writes, and the text before its calls
FORMATS = {
    "hermes": (
        "<tool_call>",
        f'Well.\n<tool_call>\n{{"name": "weather", "arguments": {AS_JSON}}}\n</tool_call>',
        "Well.\n",
    ),
    "qwen-coder": (
        "<tool_call>",
        "<tool_call>\n<function=weather>\n<parameter=city>\nKöln 7\n</parameter>\n<parameter=day>\n7\n</parameter>\n"
        "</function>\n</tool_call>",
        "",
    ),
    "glm": (
        "<tool_call>",
        "So:<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Köln 7</arg_value>\n<arg_key>day</arg_key>\n"
        "<arg_value>7</arg_value>\n</tool_call>",
        "So:",
    ),
    "mistral": ("[TOOL_CALLS]", f'[TOOL_CALLS] [{{"name": "weather", "arguments": {AS_JSON}, "id": "abcdefghi"}}]', ""),
    "mistral-named": ("[TOOL_CALLS]", f"Yes. [TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{AS_JSON}", "Yes. "),
    "llama": ("<|python_tag|>", f'{{"name": "weather", "parameters": {AS_JSON}}}', ""),
    "llama-tagged": ("<|python_tag|>", f'<|python_tag|>{{"name": "weather", "parameters": {AS_JSON}}};', ""),
    "deepseek": (
        "<｜tool▁calls▁begin｜>",  # noqa: RUF001
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{AS_JSON}\n```<｜tool▁call▁end｜>",  # noqa: RUF001
        "",
    ),
    "deepseek-3.1": (
        "<｜tool▁calls▁begin｜>",  # noqa: RUF001
        f"Hm<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{AS_JSON}<｜tool▁call▁end｜>",  # noqa: RUF001
        "Hm",
    ),
    "harmony": (
        "<|channel|>",
        "<|channel|>analysis<|message|>Think<|end|><|start|>assistant<|channel|>commentary<|message|>Soon.<|end|>"
        f"<|start|>assistant to=functions.weather<|channel|>commentary <|constrain|>json<|message|>{AS_JSON}",
        "Soon.",
    ),
}


def said(reader, text, sizes=(10**6,)):
    """What a reader makes of a text in pieces of these sizes, over and over."""
    found, at, turn = Said(), 0, 0
    while at < len(text):
        found += reader.push(text[at : at + sizes[turn % len(sizes)]])
        at, turn = at + sizes[turn % len(sizes)], turn + 1
    return found + reader.end()


class TestFormats:
    @pytest.mark.parametrize("name", FORMATS)
    def test_are_read(self, name):
        template, text, content = FORMATS[name]
        found = said(reader_of(template + "tools", [WEATHER], forced=False)(), text)
        assert [(call.name, json.loads(call.arguments)) for call in found.calls] == [("weather", ARGUMENTS)]
        assert found.content == content
        assert found.reasoning == ("Think" if name == "harmony" else "")
        assert len(found.calls[0].id) == 9, "Mistral's templates take no other"
        assert found.calls[0].id.isalnum()

    @given(st.sampled_from(sorted(FORMATS)), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 300))
    def test_do_not_depend_on_pieces(self, name, sizes, end):
        template, text, _ = FORMATS[name]
        make = reader_of(template + "tools", [WEATHER], forced=False)
        whole, pieces = said(make(), text[:end]), said(make(), text[:end], sizes)
        assert [(call.name, call.arguments) for call in pieces.calls] == [
            (call.name, call.arguments) for call in whole.calls
        ]
        assert (pieces.content, pieces.reasoning) == (whole.content, whole.reasoning)

    @pytest.mark.parametrize("name", FORMATS)
    @pytest.mark.parametrize(
        "text", ["Hello", "a {b} [c] <d>", "<tool_call>", '{"name": 5}', "[TOOL_CALLS]{", "{" * 3000, ""]
    )
    def test_leave_text_as_it_is(self, name, text):
        found = said(reader_of(FORMATS[name][0] + "tools", [WEATHER], forced=False)(), text)
        assert (found.content, found.calls) == (text, ())

    def test_have_several_calls(self):
        call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
        found = said(reader_of("<tool_call>", [NOW], forced=False)(), f"{call}\n{call}")
        assert [call.name for call in found.calls] == ["now", "now"]

    def test_of_harmony_without_tools(self):
        text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi"
        assert said(reader_of("<|channel|>", [], forced=False)(), text) == Said("Hi", "Hm.")


def piece(text, end=False):
    finish = Finish(
        finish_reason="stop", prompt_tokens=1, cached_tokens=0, completion_tokens=1, prefill_seconds=0, decode_seconds=0
    )
    return Piece(text, (), 1, finish if end else None)


class TestAnswers:
    TEXT = FORMATS["hermes"][1]

    def answer(self, **options):
        return ChatAnswer("m", None, False, reader=reader_of("<tool_call>", [WEATHER], forced=False), **options)

    def test_have_calls(self):
        choice = self.answer().whole([[piece(self.TEXT[:20]), piece(self.TEXT[20:], end=True)]], {})["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "Well.\n"
        (call,) = choice["message"]["tool_calls"]
        assert (call["type"], call["function"]) == ("function", {"name": "weather", "arguments": AS_JSON})
        only = self.answer().whole([[piece(self.TEXT[5:], end=True)]], {})["choices"][0]["message"]
        assert only["content"] is None

    def test_have_them_in_a_stream(self):
        answer = self.answer()
        chunks = [answer.chunk(0, piece(self.TEXT[:8])), answer.chunk(0, piece(self.TEXT[8:], end=True))]
        first, last = (chunk["choices"][0] for chunk in chunks)
        assert (first["delta"], first["finish_reason"]) == ({"content": "Well.\n"}, None)
        (call,) = last["delta"]["tool_calls"]
        assert (call["index"], call["function"]["arguments"], last["finish_reason"]) == (0, AS_JSON, "tool_calls")

    def test_have_one_if_no_more_are_wanted(self):
        twice = [[piece(self.TEXT + self.TEXT[6:], end=True)]]
        assert len(self.answer().whole(twice, {})["choices"][0]["message"]["tool_calls"]) == 2
        assert len(self.answer(most_calls=1).whole(twice, {})["choices"][0]["message"]["tool_calls"]) == 1


TEMPLATE = (
    "{% for t in tools or [] %}[{{ t | tojson }}]{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}:{{ c.function.arguments.city }}{% endfor %}"
    "{% endfor %}"
)
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def url(tiny_model):
    model, tokenizer = load_any(tiny_model)
    tokenizer.chat_template = TEMPLATE
    with running((model, tokenizer)) as address:
        yield address


class TestCalls:
    @pytest.mark.parametrize(
        ("choice", "name"), [("required", None), ({"type": "function", "function": {"name": "weather"}}, "weather")]
    )
    def test_that_are_asked_for_come_and_fit(self, url, choice, name):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            asked = {
                "model": "tiny", "messages": [USER], "tools": [NOW, WEATHER], "tool_choice": choice,
                "logit_bias": {str(n): 5 for n in range(33, 50)}, "max_tokens": 300, "seed": 3,
            }  # fmt: skip
            found = client.chat.completions.create(**asked).choices[0]
            (call,) = found.message.tool_calls
            assert (found.finish_reason, found.message.content) == ("tool_calls", None)
            assert call.function.name == (name or call.function.name)
            arguments = json.loads(call.function.arguments)
            if call.function.name == "weather":
                assert isinstance(arguments["city"], str)
                assert isinstance(arguments["day"], int)
            *_, last = client.chat.completions.create(stream=True, **asked)
            assert last.choices[0].delta.tool_calls[0].function.arguments == call.function.arguments
            assert last.choices[0].finish_reason == "tool_calls"

    def test_grammar_of_each_has_its_own_references(self):
        assert forced_grammar([NOW | {"function": {"name": "now", "parameters": {}}}, WEATHER]).count("$defs/day") == 1

    def test_are_described_and_echoed_by_the_template(self, http):
        calls = [{"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": AS_JSON}}]
        history = [USER, {"role": "assistant", "content": None, "tool_calls": calls}, {**USER, "role": "tool"}]
        tokens = http.post("/tokenize", json={"messages": history, "tools": [NOW]}).json()["tokens"]
        text = http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
        begin, _, rest = text.partition("<user>")
        assert json.loads(begin[1:-1])["function"] == {
            "name": "now",
            "parameters": {"type": "object", "properties": {}},
        }
        assert rest == "Hi<assistant><tool_call>weather:Köln 7<tool>Hi"

    def test_are_described_only_if_they_may_be_made(self, http):
        def read(**more):
            body = {"messages": [USER], "max_tokens": 1, **more}
            found = http.post("/v1/chat/completions", json=body)
            assert found.status_code == 200, found.text
            return found.json()["usage"]["prompt_tokens"]

        assert read(tools=[NOW]) > read() == read(tools=[NOW], tool_choice="none")
        strict = {"type": "function", "function": {"name": "f", "strict": True}}
        body = {"messages": [USER], "max_tokens": 1, "tools": [strict]}
        assert http.post("/v1/chat/completions", json=body).headers["x-moqa-ignored"] == "tools.function.strict"

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"tool_choice": "required"}, "tool_choice"),
            ({"tools": [NOW], "tool_choice": "sometimes"}, "tool_choice"),
            ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
            ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
            ({"tools": [NOW], "response_format": {"type": "json_object"}}, "tools"),
            (
                {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
                "messages",
            ),
        ],
    )
    def test_are_refused_if_they_make_no_sense(self, http, body, param):
        fails(http.post("/v1/chat/completions", json={"messages": [USER], **body}), 400, param)

    def test_need_a_template(self, tiny_model):
        call = {"function": {"name": "f", "arguments": "{}"}}
        with running(load_any(tiny_model)) as url, httpx.Client(base_url=url, timeout=PATIENCE) as http:
            for body in ({"tools": [NOW]}, {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}):
                response = http.post("/v1/chat/completions", json={"messages": [USER], **body})
                fails(response, 400, word="chat template")
