"""Chats as text: the one way from messages to a model's chat template, for calibration, evaluation and serving."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moqa.data.templates import render
from moqa.errors import MoqaError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# some models write the end of their thinking only
_THINKING = re.compile(r"(<think>|\A).*?</think>", re.DOTALL)


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    /,
    *,
    answer: bool = False,
    **options: Any,
) -> str:
    """Text of a conversation by the tokenizer's chat template.

    >>> chat_text(tokenizer, [{"role": "user", "content": "Hello"}])  # doctest: +SKIP
    '<|user|>Hello'

    Args:
        tokenizer: with a chat template.
        messages: in the form of OpenAI's API. Text parts of a content are joined, the role `developer` is called
            `system`, and the arguments of tool calls are given to the template as objects.
        answer: end with the beginning of the model's answer. What the template leaves out is then its author's choice;
            in a text to fit or to measure it is an error.
        options: further variables of the template, such as `tools`.

    Raises:
        MoqaError: if a part is not text, or the template refuses a message, leaves its content or tool calls out or
            exceeds its limits (see `render`). Thinking is left out by many templates, on purpose.
    """
    plain = [_plain(number, message) for number, message in enumerate(messages, 1)]
    options = {name: value for name, value in options.items() if value is not None}
    template = template_of(tokenizer, tools="tools" in options)
    variables = {**tokenizer.special_tokens_map, **options, "add_generation_prompt": answer}
    text = render(template, plain, **variables)
    if not answer:
        for number, message in enumerate(plain, 1):
            _check_said(number, message, text)
    return text


def template_of(tokenizer: PreTrainedTokenizerBase, tools: bool = False) -> str:
    """Source of the chat template; empty if there is none.

    >>> template_of(tokenizer)
    ''

    Args:
        tokenizer: of the model.
        tools: whether there are tools, for which some models have a template of its own.

    Raises:
        MoqaError: if there are several, and none is the default.
    """
    if tokenizer.chat_template is None:
        return ""
    try:
        return str(tokenizer.get_chat_template(tools=[{}] if tools else None))
    except ValueError as error:
        raise MoqaError("the model has no default chat template", one_line(error)) from None


def _plain(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = "".join(_part(number, part) for part in content)
    elif content is None:
        content = ""
    if not isinstance(content, str):
        raise MoqaError(f"message {number} has a content of type {type(content).__name__}", "give a text or text parts")
    role = "system" if message["role"] == "developer" else message["role"]
    plain = {**message, "role": role, "content": content}
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [_call(number, call) for call in calls]
    return {name: value for name, value in plain.items() if value is not None}


def _part(number: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise MoqaError(f"message {number} has a part of type {kind!r}", "only text parts can be read")


def _call(number: int, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise MoqaError(f"message {number} has a tool call without a function name", "give the form of OpenAI's API")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise MoqaError(
                f"message {number} calls {function['name']} with arguments that are not JSON", str(error)
            ) from None
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _check_said(number: int, message: Mapping[str, Any], text: str) -> None:
    """Refuse a message whose words are not in the text: the template has no way to say them."""
    said = _THINKING.sub("", message["content"]).strip()
    names = [call["function"]["name"] for call in message.get("tool_calls", ())]
    # templates may strip lines and escape, but all of them keep words
    words = [] if said in text else dict.fromkeys(said.split())
    lost = next((word for word in (*words, *names) if word not in text and _escaped(word) not in text), None)
    if lost is not None:
        what = textwrap.shorten(lost, 40, placeholder="...")
        raise MoqaError(
            f"the chat template leaves out {what!r} of message {number} (role {message['role']})",
            "leave such messages out, or use a template that has a place for them",
        )


def _escaped(word: str) -> str:
    return json.dumps(word, ensure_ascii=False)[1:-1]
