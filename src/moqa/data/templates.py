"""Chat templates: programs of a model's author, rendered in a process whose time, memory and output have limits."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from moqa.data import rendering
from moqa.errors import MoqaError, one_line

# What a template may take, and what each byte of it and of its messages adds to that. The system enforces it, because a
# few letters of a template can ask for any time and memory, in more ways than a sandbox could count.
_SECONDS, _BYTES_OF_A_SECOND = 2, 2**19
_MEMORY, _MEMORY_OF_A_BYTE = 2**28, 32
_CHARACTERS, _CHARACTERS_OF_A_BYTE = 2**16, 32
_LONGEST_REASON = 300  # characters

# processes that wait for the next template, as many as threads have rendered at the same time
_idle: list[subprocess.Popen[bytes]] = []
os.register_at_fork(after_in_child=_idle.clear)


def render(template: str, messages: Sequence[Mapping[str, Any]], /, **variables: Any) -> str:
    """Text of a conversation, as transformers renders it.

    >>> render("{{ messages[0].content }}, {{ name }}!", [{"content": "Hello"}], name="Ada")
    'Hello, Ada!'

    Args:
        template: source of a chat template.
        messages: of the conversation.
        variables: of the template, `tools` and `add_generation_prompt` among them.

    Raises:
        MoqaError: if the template refuses the messages, or takes more time, memory or text than messages of this size
            can need. What it took is then free again.
    """
    try:
        question = json.dumps((template, messages, variables), default=_named).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise MoqaError("no chat template can be given these messages", one_line(error)) from None
    seconds = _SECONDS + len(question) // _BYTES_OF_A_SECOND
    memory = _MEMORY + len(question) * _MEMORY_OF_A_BYTE
    characters = _CHARACTERS + len(question) * _CHARACTERS_OF_A_BYTE
    try:
        process = _idle.pop()
    except IndexError:
        process = _start()
    try:
        answer = _ask(process, [json.dumps((seconds, memory, characters)).encode(), question])
    except BaseException:  # such as an interrupt: a later template would get this one's answer
        _end(process)
        raise
    if answer is None:
        status = _end(process)
        limits = {
            -signal.SIGXCPU: f"more than {seconds} s of processor time",
            rendering.TOO_MUCH_MEMORY: f"more than {memory / 2**20:.0f} MiB of memory",
            rendering.TOO_LONG: f"more than {characters} characters",
        }
        taken = limits.get(status, f"a process down, with status {status},")
        raise MoqaError(
            f"the chat template takes {taken} for {len(question)} bytes of messages and template",
            "mend the template, or use a model with another one",
        )
    _idle.append(process)
    kind, text = answer
    if kind == "refusal":
        reason = textwrap.shorten(text, _LONGEST_REASON, placeholder=" ...")
        raise MoqaError("the chat template refuses these messages", reason)
    return text


def _named(value: Any) -> str:
    """What JSON cannot say is named by its type, as transformers does: no template reads it."""
    return f"<{type(value).__name__}>"


def _start() -> subprocess.Popen[bytes]:
    # -P: what lies in a user's folder is not imported. An interrupt from the terminal is for this process only
    return subprocess.Popen(
        [sys.executable, "-P", rendering.__file__],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def _ask(process: subprocess.Popen[bytes], lines: Sequence[bytes]) -> tuple[str, str] | None:
    """Kind and text of the answer; None if the process ended instead."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.writelines(line + b"\n" for line in lines)
        process.stdin.flush()
    except BrokenPipeError:
        return None
    answer = process.stdout.readline()
    return json.loads(answer) if answer.endswith(b"\n") else None


def _end(process: subprocess.Popen[bytes]) -> int:
    """End a process that has not ended yet; its status."""
    process.kill()
    with suppress(BrokenPipeError), process:
        pass
    return process.returncode
