"""Exports: each is a function that writes one format of another engine, in a file of its own in `members/`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moqa.registry import Registry

if TYPE_CHECKING:
    from moqa.profiling import Profile
    from moqa.progress import Report


@dataclass(frozen=True)
class ExportJob:
    """What an export is made from.

    Attributes:
        source: a plan, profile or checkpoint, as the user gave it.
        out: file or folder to make.
        profile: that a plan was made from; None: where the plan says.
        model: the original; None: where the profile or the checkpoint says.
        overwrite: replace a file that exists at `out`, or a folder that is an export.
        restart: discard what an earlier run has finished.
        report: called with the name of a step, how much of it is done, and its total.
        width: of a checkpoint with nested widths; None means the widest.
    """

    source: str
    out: Path
    profile: Profile | None
    model: str | None
    overwrite: bool
    restart: bool
    report: Report
    width: int | None = None


@dataclass(frozen=True)
class Export:
    """A format of another engine.

    Attributes:
        name: as users type it.
        write: the function that writes it; returns remarks for the user.
    """

    name: str
    write: Callable[[ExportJob], list[str]]


# format -> what it is made from and what it is, for the help of the command, which imports none of the modules: each is
# in a module of its own in `members/`, with "_" for "-"
FORMATS = {
    "gguf": "a model for llama.cpp, from a plan of --engine llama.cpp",
    "imatrix": "importance for llama-quantize --imatrix, per expert, from a profile",
    "tensor-types": "types for llama-quantize --tensor-type-file, from a plan of --engine llama.cpp",
    "moqa": "an ordinary checkpoint of one --width, from a checkpoint with nested widths",
    "compressed-tensors": "a model for vLLM and transformers, from a checkpoint that was planned with --engine vllm",
}
EXPORTS: Registry[Export] = Registry(
    "--to", {name: f"moqa.exports.members.{name.replace('-', '_')}" for name in FORMATS}
)
exports = EXPORTS.decorator(Export)
