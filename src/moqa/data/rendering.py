"""The process that renders chat templates for `moqa.data.templates`; it imports nothing of moqa, and little else."""

import json
import math
import resource
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

# exit statuses; too much time ends the process by SIGXCPU
TOO_MUCH_MEMORY, TOO_LONG = 3, 4
_LONGEST_REASON = 1000  # characters


def main() -> None:
    """Answer what comes on stdin, until nothing comes or an answer exceeds its limits."""
    asked, answers = sys.stdin.buffer, sys.stdout.buffer
    render = _import_renderer()
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _limit(resource.RLIMIT_CORE, 0)
    while limits := asked.readline():
        seconds, memory, characters = json.loads(limits)
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds))
        _limit(resource.RLIMIT_AS, taken + memory)
        try:
            template, messages, variables = json.loads(asked.readline())
            kind, text = "text", render(conversations=[messages], chat_template=template, **variables)[0][0]
        except MemoryError:
            sys.exit(TOO_MUCH_MEMORY)
        except Exception as error:  # a template is a program of the model's author and may raise anything
            kind, text = "refusal", (str(error) or type(error).__name__)[:_LONGEST_REASON]
        if len(text) > characters:
            sys.exit(TOO_LONG)
        answers.write(json.dumps([kind, text]).encode() + b"\n")
        answers.flush()


def _import_renderer() -> Callable[..., Any]:
    """transformers' own function, without the rest of transformers, whose import takes a second."""
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = spec.submodule_search_locations[0]
    for name, place in (("transformers", folder), ("transformers.utils", f"{folder}/utils")):
        package = sys.modules[name] = ModuleType(name)
        package.__path__ = [place]
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    main()
