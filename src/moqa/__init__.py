"""moqa gives precision to the parts of a Mixture-of-Experts model that the data needs.

>>> import moqa
>>> profile = moqa.profile("reference/model", {"wiki": "wiki.txt", "novels": "novels.txt"}, "runs/profile")
>>> plan = moqa.plan(profile, "3bpw")
>>> out = moqa.quantize("reference/model", plan, "runs/out")
>>> moqa.evaluate(out, {"wiki": "wiki.held-out.txt"}).distributions["wiki"].kl_divergence
>>> model, tokenizer = moqa.load(out)

`moqa.profile`, `plan`, `quantize`, `evaluate` and `report` are folders of the library and functions at once. Nothing
heavy is imported before one of them is used. On a system that moqa does not run on, importing it works and using it is
a `MoqaError`.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from moqa.errors import MoqaError
from moqa.on_import import on_import
from moqa.support import Refusal, unsupported

if TYPE_CHECKING:
    from moqa.runtime.load import load

    __version__: str  # that of pyproject.toml, read when it is asked for

__all__ = ["MoqaError", "adjust", "bench", "evaluate", "generate", "load", "plan", "profile", "quantize", "report"]

_FOLDERS = ("adjust", "bench", "evaluate", "generate", "plan", "profile", "quantize", "report")

if unsupported():
    sys.meta_path.insert(0, Refusal())
else:
    # from here on transformers' from_pretrained reads moqa's checkpoints
    on_import("transformers.quantizers.auto", "moqa.runtime.from_pretrained")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # takes longer to import than moqa

        return globals().setdefault(name, version("moqa"))
    if name == "load":
        return importlib.import_module("moqa.runtime.load").load
    if name in _FOLDERS:
        return importlib.import_module(f"moqa.{name}")
    raise AttributeError(f"module 'moqa' has no attribute {name!r}")
