"""What every piece of work gets: the model, and the folder of unfinished work."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import torch

from moqa import __version__
from moqa.errors import MoqaError, Stopped
from moqa.kernels import find_kernels
from moqa.memory.process import return_large_blocks
from moqa.models.layerwise import LayerwiseModel
from moqa.models.view import ModelView, open_model
from moqa.models.whole import stages_of
from moqa.originals.fingerprint import differing_part, file_times, fingerprint
from moqa.storage.resumable import ResumableRun

Made = TypeVar("Made")


class Workspace:
    """The model and the work folder, opened in this process.

    >>> workspace = Workspace(open_model("reference/model", keep=False), work)
    >>> workspace.view.block_units(0)[0].name
    'model.layers.0.self_attn.q_proj'

    Args:
        view: the model.
        work: the folder of unfinished work.

    Attributes:
        mark: differs between processes that share a work folder; part of the names of their private files.
    """

    def __init__(self, view: ModelView, work: ResumableRun) -> None:
        self.view, self.work, self.mark = view, work, ""
        self._made: dict[Hashable, object] = {}

    @cached_property
    def stages(self) -> LayerwiseModel:
        """The model, block by block."""
        return stages_of(self.view.model)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """The object with a key, made at the first call."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[return-value]

    @cached_property
    def place(self) -> "WorkspaceAddress":
        """Description by which another process opens the same workspace."""
        assert self.view.folder is not None
        return WorkspaceAddress.here(self.view.folder, self.work.folder)


@dataclass(frozen=True)
class WorkspaceAddress:
    """A `Workspace` for another process: what its machine must have to compute the same bytes as this one.

    Attributes:
        model: folder of the original.
        fingerprint: of the model.
        times: of its weight files: machines that share them need not read all of them.
        shared: file or folder that all machines share.
        versions: name of each library that computes -> version.
        threads: threads of torch, because sums depend on their number.
        run: identifies the run, so that nothing of an earlier one is used.
    """

    model: Path
    fingerprint: str
    times: tuple[tuple[int, int], ...]
    shared: Path
    versions: dict[str, str]
    threads: int
    run: str

    @classmethod
    def here(cls, model: Path, shared: Path) -> "WorkspaceAddress":
        """What this process has."""
        threads, run = torch.get_num_threads(), uuid4().hex
        identity, times = fingerprint(model), file_times(model)
        return cls(model.absolute(), identity, times, shared.absolute(), _versions(), threads, run)

    def lacking(self) -> str | None:
        """What this machine lacks, worded to follow its name in a message; None if it has everything."""
        for name, found in _versions().items():
            if found != self.versions[name]:
                return f"has {name} {found}, this process has {self.versions[name]}"
        if not self.shared.exists():
            return f"does not see {self.shared.parent}"
        try:
            if not self.model.is_dir():
                return f"has no model in {self.model}"
            other = differing_part(self.model, self.fingerprint, self.times)
        except (MoqaError, OSError) as error:
            return f"cannot read the model ({error})"
        return f"has another model in {self.model}, with other {other}" if other else None


_opened: dict[str, Workspace] = {}


def opened(place: WorkspaceAddress) -> Workspace:
    """The described workspace, opened in this process when a run first needs it.

    Raises:
        Stopped: if this machine, which may have joined after the run began, lacks something.
    """
    if place.run in _opened:
        return _opened[place.run]
    _opened.clear()
    lacking = place.lacking()
    if lacking:
        raise Stopped(f"a machine {lacking}; the same command continues without it")
    if torch.get_num_threads() != place.threads:
        torch.set_num_threads(place.threads)
    return_large_blocks()
    workspace = Workspace(open_model(place.model, keep=False), ResumableRun(place.shared))
    workspace.mark = f"-{uuid4().hex}"
    return _opened.setdefault(place.run, workspace)


def _versions() -> dict[str, str]:
    names = {name: version(name) for name in ("torch", "transformers")}
    return {
        "moqa": __version__, **names, "kernels": find_kernels("auto").name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
