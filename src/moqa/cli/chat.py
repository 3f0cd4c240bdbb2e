"""`moqa chat`: talk with a checkpoint."""

import signal
import sys
from contextlib import closing
from typing import TYPE_CHECKING

from moqa.cli import options
from moqa.cli.app import app
from moqa.cli.common import say, shown
from moqa.cli.generate import sampling_of, use_threads
from moqa.errors import MoqaError

if TYPE_CHECKING:
    from moqa.generation import Chat


@app.command()
def chat(
    out: options.Out,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    stop: options.Stop = None,
    seed: options.SamplingSeed = 0,
    adjustment: options.Adjustment = None,
    threads: options.Threads = None,
    lora: options.Lora = None,
    kv_bits: options.KvBits = None,
    width: options.Width = None,
) -> None:
    """Talk with a checkpoint on a terminal, or line by line from stdin."""
    from moqa.generation import Chat
    from moqa.mixture.load import load_any

    sampling = sampling_of(max_tokens, temperature, top_p, top_k, stop, seed)
    use_threads(threads)
    talk = Chat(*load_any(out, adjustment, lora, kv_bits, width), sampling)
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    if sys.stdin.isatty():
        import readline  # noqa: F401  (lets input() edit lines and recall earlier ones)

        say("/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer", err=True)
    while (line := _next_line()) != "/exit":
        if line == "/reset":
            talk.reset()
        elif line:
            _answer(talk, line)


def _next_line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        print(end="\n" if sys.stdin.isatty() else "")
        return "/exit"
    except KeyboardInterrupt:
        print()
        return ""


def _answer(talk: "Chat", line: str) -> None:
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    # stop between two tokens: an interrupt inside an operation would leave the key-value cache half updated
    before = signal.signal(signal.SIGINT, stop)
    try:
        with closing(talk.say(line)) as pieces:
            for piece in pieces:
                print(shown(piece.text), end="", flush=True)
                if stopped:
                    break
        print()
    except MoqaError as error:
        say(f"moqa: {error}; /reset starts a new conversation", err=True)
    finally:
        signal.signal(signal.SIGINT, before)
