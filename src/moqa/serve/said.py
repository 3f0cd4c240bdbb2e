"""What an answer says: its text, the reasoning before it, and calls of tools."""

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moqa.generation.text import StopStrings


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool, with its arguments as a JSON text."""

    name: str
    arguments: str
    # nine letters and digits: Mistral's templates accept nothing else
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:9])

    @classmethod
    def of(cls, value: Any) -> "ToolCall":
        """A call from the object that most models write.

        >>> ToolCall.of({"name": "add", "arguments": {"a": 1}}).arguments
        '{"a": 1}'

        Raises:
            ValueError: if it is not such an object.
        """
        if isinstance(value, dict) and isinstance(name := value.get("name"), str):
            arguments = value.get("arguments", value.get("parameters"))
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            if isinstance(arguments, dict):
                return cls(name, json.dumps(arguments, ensure_ascii=False))
        raise ValueError("no call of a tool")


@dataclass(frozen=True)
class Said:
    """A part of an answer."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()

    def __add__(self, other: "Said") -> "Said":
        """Both parts, one after the other."""
        return Said(self.content + other.content, self.reasoning + other.reasoning, self.calls + other.calls)


class AnswerReader:
    """Reads an answer that is nothing but text.

    >>> AnswerReader().push("Hello")
    Said(content='Hello', reasoning='', calls=())
    """

    def push(self, text: str) -> Said:
        """What can be said after more of the answer."""
        return Said(text)

    def end(self) -> Said:
        """What is left at the end of the answer."""
        return Said()


class CallReader(AnswerReader):
    """Reads an answer that ends with calls; what looks like a call and is none stays text.

    >>> reader = CallReader(["<call>"], lambda text: [ToolCall("f", "{}")])
    >>> reader.push("Well. <call>f"), reader.end().calls[0].name
    (Said(content='Well. ', reasoning='', calls=()), 'f')

    Args:
        marks: texts that calls begin with.
        read: reads the calls from the first mark on; raises ValueError if there are none.
    """

    def __init__(self, marks: Sequence[str], read: Callable[[str], Sequence[ToolCall]]) -> None:
        self._marks, self._read = StopStrings(marks), read
        self._calls: str | None = None

    def push(self, text: str) -> Said:
        """See `AnswerReader`."""
        if self._calls is not None:
            self._calls += text
            return Said()
        content, begins = self._marks.push(text)
        if begins:
            self._calls = self._marks.rest
        return Said(content)

    def end(self) -> Said:
        """See `AnswerReader`."""
        if self._calls is None:
            return Said(self._marks.flush())
        try:
            calls = tuple(self._read(self._calls))
        except (ValueError, RecursionError):
            calls = ()
        return Said(calls=calls) if calls else Said(self._calls)
