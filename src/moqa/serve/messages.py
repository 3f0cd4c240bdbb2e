"""Messages of a conversation, and the functions that its model may call."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from moqa.serve.fields import MOST, Asked, described
from moqa.serve.refusal import RefusalError

_MOST_CALLS = 128


class TextPart(Asked):
    """A part of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(Asked):
    """A function with arguments, as a JSON text."""

    name: str
    arguments: str = "{}"


class EarlierCall(Asked):
    """A call in an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def plain(self) -> dict[str, Any]:
        """The call in the form that chat templates expect.

        Raises:
            RefusalError: if the arguments are not a JSON object.
        """
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise RefusalError(400, "the arguments of a tool call should be a JSON object, as text", param="messages")
        named = {} if self.id is None else {"id": self.id}
        return {**named, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class ChatMessage(Asked):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str | Annotated[list[TextPart], Field(max_length=MOST, fail_fast=True)] | None,
        described(f"a text or a list of text parts, at most {MOST}; nothing else can be read"),
    ] = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = Field(None, description="another name of reasoning_content")
    tool_calls: Annotated[list[EarlierCall], Field(max_length=_MOST_CALLS)] = Field([])
    tool_call_id: str | None = None
    function_call: None = Field(None, description="OpenAI's older form of tool_calls")
    audio: None = None

    @model_validator(mode="after")
    def _says_something(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise ValueError("should have a content")
        return self

    def plain(self) -> dict[str, Any]:
        """The message in the form that chat templates expect, in which the role `developer` is called `system`.

        Raises:
            RefusalError: if the arguments of a call are not a JSON object.
        """
        content = self.content or ""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content if isinstance(content, str) else "".join(part.text for part in content),
        }
        message |= self.model_dump(include={"name", "tool_call_id"}, exclude_none=True)
        if reasoning := self.reasoning_content or self.reasoning:
            message["reasoning_content"] = reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]
        return message


class Function(Asked):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] = Field({"type": "object", "properties": {}})
    strict: bool = Field(False, description="calls that are forced always fit the parameters; others are not checked")


class Tool(Asked):
    """A tool; only functions are known."""

    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """The tool in the form that chat templates expect."""
        return self.model_dump(
            include={"type": True, "function": {"name", "description", "parameters"}}, exclude_none=True
        )


class ChosenName(Asked):
    """The name of a function."""

    name: str


class ChosenTool(Asked):
    """The one function to call."""

    type: Literal["function"]
    function: ChosenName
