"""What a piece of work finds where it is done: the model, and the folder of unfinished work."""

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
from moqa.originals import folder as original
from moqa.storage.resumable import ResumableRun

Made = TypeVar("Made")


class Workspace:
    """The model and the work folder, as this process has them open.

    >>> site = Workspace(open_model("reference/model", keep=False), work)
    >>> site.view.block_units(0)[0].name
    'model.layers.0.self_attn.q_proj'

    Args:
        view: the model.
        work: where everything is put aside.

    Attributes:
        mark: differs between processes that share a work folder, for the names of what only one of them needs.
    """

    def __init__(self, view: ModelView, work: ResumableRun) -> None:
        self.view, self.work, self.mark = view, work, ""
        self._made: dict[Hashable, object] = {}
        self._run = uuid4().hex

    @cached_property
    def stages(self) -> LayerwiseModel:
        """Of the model."""
        return LayerwiseModel(self.view.model)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What was made for a key before, or is made now."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[return-value]

    @cached_property
    def place(self) -> "WorkspaceAddress":
        """How another process opens the same."""
        assert self.view.folder is not None
        wanted = Requirements.here(self.view.folder, self.work.folder)
        return WorkspaceAddress(wanted, torch.get_num_threads(), self._run)


@dataclass(frozen=True)
class Requirements:
    """What a machine must have for the bytes to be those of this one.

    Attributes:
        model: folder of the original.
        fingerprint: of its content.
        shared: file or folder that exists on all machines because they share it.
        versions: name -> version of what computes.
    """

    model: Path
    fingerprint: str
    shared: Path
    versions: dict[str, str]

    @classmethod
    def here(cls, model: Path, shared: Path) -> "Requirements":
        """What this process has."""
        return cls(model.absolute(), original.fingerprint(model), shared.absolute(), _versions())

    def lacking(self) -> str | None:
        """What this machine lacks, in words that follow its name; None if it has everything."""
        for name, found in _versions().items():
            if found != self.versions[name]:
                return f"has {name} {found}, this process has {self.versions[name]}"
        if not self.shared.exists():
            return f"does not see {self.shared.parent}"
        try:
            found = original.fingerprint(self.model) if self.model.is_dir() else ""
        except (MoqaError, OSError) as error:
            return f"cannot read the model ({error})"
        return None if found == self.fingerprint else f"has {'another' if found else 'no'} model in {self.model}"


@dataclass(frozen=True)
class WorkspaceAddress:
    """A description of a `Workspace` that can be sent to another process.

    Attributes:
        wanted: the model, the work folder, and the versions.
        threads: that torch computes with, since sums depend on it.
        run: tells what belongs to one run from what an earlier one left.
    """

    wanted: Requirements
    threads: int
    run: str


_sites: dict[str, Workspace] = {}


def opened(place: WorkspaceAddress) -> Workspace:
    """The site that is described, opened in this process when its run first asks for it.

    Raises:
        Stopped: if this machine, which may have come later than the run, lacks something.
    """
    if place.run not in _sites:
        _sites.clear()
        _sites[place.run] = _open(place)
    return _sites[place.run]


def _open(place: WorkspaceAddress) -> Workspace:
    lacking = place.wanted.lacking()
    if lacking:
        raise Stopped(f"a machine {lacking}; the same command goes on without it")
    if torch.get_num_threads() != place.threads:
        torch.set_num_threads(place.threads)
    return_large_blocks()
    site = Workspace(open_model(place.wanted.model, keep=False), ResumableRun(place.wanted.shared))
    site.mark = f"-{uuid4().hex}"
    return site


def _versions() -> dict[str, str]:
    names = {name: version(name) for name in ("torch", "transformers")}
    return {
        "moqa": __version__, **names, "kernels": find_kernels("auto").name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
