"""Answers in OpenAI's harmony format, which gpt-oss writes: messages with a channel and perhaps a recipient."""

import json
import re

from moqa.generation.text import StopStrings
from moqa.serve.said import AnswerReader, Said, ToolCall

MARK = "<|channel|>"
_BODY = "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")


class HarmonyReader(AnswerReader):
    """Reads reasoning (channel `analysis`), calls (with a recipient), and text (all else).

    >>> reader = HarmonyReader()
    >>> reader.push("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi")
    Said(content='Hi', reasoning='Hm.', calls=())
    """

    def __init__(self) -> None:
        self._head, self._channel, self._tool, self._arguments = "", "", "", ""
        self._body: StopStrings | None = None  # None in the header of a message

    def push(self, text: str) -> Said:
        """See `AnswerReader`."""
        said = Said()
        while text:
            if self._body is None:
                self._head, mark, text = (self._head + text).partition(_BODY)
                if mark:
                    self._begin()
                continue
            found, ends = self._body.push(text)
            said += self._place(found)
            text = self._body.rest if ends else ""
            if ends:
                said += self._finish()
        return said

    def end(self) -> Said:
        """See `AnswerReader`."""
        if self._body is None:
            # a text without any message is not in this format
            return Said(self._head if MARK not in self._head and not self._channel else "")
        return self._place(self._body.flush()) + self._finish()

    def _begin(self) -> None:
        channel = re.search(r"<\|channel\|>\s*(\w+)", self._head)
        recipient = re.search(r"\bto=(?:functions\.)?([\w.-]+)", self._head)
        self._channel = channel[1] if channel else "final"
        self._tool = recipient[1] if recipient else ""
        self._body, self._arguments = StopStrings(_ENDS), ""

    def _place(self, text: str) -> Said:
        if self._tool:
            self._arguments += text
            return Said()
        return Said(reasoning=text) if self._channel == "analysis" else Said(text)

    def _finish(self) -> Said:
        self._head, self._body = "", None
        if not self._tool:
            return Said()
        try:
            value = {"name": self._tool, "arguments": json.loads(self._arguments or "{}")}
            return Said(calls=(ToolCall.of(value),))
        except (ValueError, RecursionError):
            return Said(self._arguments)
