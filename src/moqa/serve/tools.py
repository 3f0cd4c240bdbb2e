"""How models write calls of tools, by the marks in their chat template."""

# ruff: noqa: RUF001  (DeepSeek's marks have wide bars)
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from moqa.generation import json_grammar
from moqa.serve.harmony import MARK, HarmonyReader
from moqa.serve.said import AnswerReader, CallReader, ToolCall

Tools = Sequence[Mapping[str, Any]]  # as in OpenAI's API


def reader_of(template: str, tools: Tools, forced: bool) -> Callable[[], AnswerReader]:
    """Makes readers of the answers that a model gives.

    >>> reader_of("", [], forced=False)().push("Hello").content
    'Hello'

    Args:
        template: source of the model's chat template.
        tools: that the model may call.
        forced: whether the answer is made by `forced_grammar`.
    """
    if forced:
        return partial(CallReader, ["{"], _objects)
    if MARK in template:
        return HarmonyReader
    if not tools:
        return AnswerReader
    for mark, read in _FORMATS.items():
        if mark in template:
            return partial(CallReader, [mark], partial(read, tools=tools))
    return partial(CallReader, ["<|python_tag|>", "{"], _objects)


def forced_grammar(tools: Tools) -> str:
    """The grammar of a call of one of some tools, and nothing else.

    >>> print(forced_grammar([{"function": {"name": "now", "parameters": {"type": "object"}}}]))
    start: call_0
    call_0: "{\\"name\\": \\"now\\", \\"arguments\\": " arguments_0 "}"
    arguments_0: %json {"type": "object", ...}
    """
    lines = ["start: " + " | ".join(f"call_{number}" for number in range(len(tools)))]
    for number, tool in enumerate(tools):
        begin = json.dumps(f'{{"name": {json.dumps(tool["function"]["name"])}, "arguments": ')
        lines.append(f'call_{number}: {begin} arguments_{number} "}}"')
        # each has its own root: references inside of a schema stay valid
        lines.append(json_grammar(tool["function"]["parameters"]).replace("start", f"arguments_{number}", 1))
    return "\n".join(lines)


def _objects(text: str) -> list[ToolCall]:
    """JSON objects one after another, as Llama writes them, or in a list."""
    calls, text = list[ToolCall](), text.removeprefix("<|python_tag|>").strip()
    while text:
        value, end = json.JSONDecoder().raw_decode(text)
        calls += [ToolCall.of(one) for one in (value if isinstance(value, list) else [value])]
        text = text[end:].lstrip(" \n;,")
    return calls


def _tagged(text: str, tools: Tools) -> list[ToolCall]:
    """Hermes and Qwen (JSON), Qwen Coder (XML) and GLM (keys and values), all between the same tags."""
    calls = list[ToolCall]()
    for body in re.findall(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", text, re.DOTALL):
        if body.startswith("{"):
            calls += _objects(body)
            continue
        name, pairs = _from_xml(body) if body.startswith("<function=") else _from_keys(body)
        types = {
            key: schema.get("type")
            for tool in tools
            if tool["function"]["name"] == name
            for key, schema in tool["function"]["parameters"].get("properties", {}).items()
            if isinstance(schema, dict)
        }
        arguments = {key: value if types.get(key) == "string" else _value(value) for key, value in pairs}
        calls.append(ToolCall.of({"name": name, "arguments": arguments}))
    return calls


def _from_xml(body: str) -> tuple[str, list[tuple[str, str]]]:
    name = re.match(r"<function=([^>\n]+)>", body)
    if name is None:
        raise ValueError("no call of a tool")
    pairs = re.findall(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", body, re.DOTALL)
    return name[1].strip(), pairs


def _from_keys(body: str) -> tuple[str, list[tuple[str, str]]]:
    pair = r"<arg_key>\s*(.*?)\s*</arg_key>\s*<arg_value>(.*?)</arg_value>"
    name = body.partition("<arg_key>")[0].strip()
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError("no call of a tool")
    return name, re.findall(pair, body, re.DOTALL)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _mistral(text: str, tools: Tools) -> list[ToolCall]:  # noqa: ARG001
    """A list of objects, or names with arguments, each behind the mark."""
    calls = list[ToolCall]()
    for part in filter(None, (part.strip() for part in text.split("[TOOL_CALLS]"))):
        named = re.match(r"([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)", part)
        if named is None:
            calls += _objects(part)
        else:
            calls.append(ToolCall.of({"name": named[1], "arguments": part[named.end() :]}))
    return calls


def _deepseek(text: str, tools: Tools) -> list[ToolCall]:  # noqa: ARG001
    found = re.findall(
        r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?([\w.-]+)(?:<｜tool▁sep｜>|\n```json\n)(.*?)(?:\n```)?"
        r"<｜tool▁call▁end｜>",
        text, re.DOTALL,
    )  # fmt: skip
    if not found:
        raise ValueError("no call of a tool")
    return [ToolCall.of({"name": name, "arguments": arguments}) for name, arguments in found]


_FORMATS: dict[str, Callable[..., list[ToolCall]]] = {
    "[TOOL_CALLS]": _mistral, "<｜tool▁calls▁begin｜>": _deepseek, "<tool_call>": _tagged,
}  # fmt: skip
