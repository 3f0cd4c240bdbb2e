"""`--fit 8GiB`: the budget for the weight files, computed from the memory that the served model may use."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from moqa.errors import MoqaError
from moqa.forecast.serving import Needs, ServedModel
from moqa.format.layout import Entry, shards
from moqa.format.tiles import KEEP_WIDTH, WIDTHS
from moqa.memory.limit import free_memory, parse_size
from moqa.models.units import ROLES
from moqa.models.view import ModelView
from moqa.planning.budget import Budget
from moqa.planning.candidates import candidates
from moqa.planning.registry import DEFAULT_ENCODINGS
from moqa.profiling import Profile
from moqa.profiling.sensitivity import GROUPS

AUTO = "auto"
DEFAULT_CONTEXT = 8192


@dataclass(frozen=True, kw_only=True)
class MemoryBudget(Budget):
    """The part of a memory limit that is left for the weight files; made by `memory_budget`.

    >>> memory_budget("reference/model", "1GiB", context=1024, batch=2).cache
    12582912

    Attributes:
        memory: limit on all memory, in bytes.
        context: tokens of a conversation.
        batch: conversations at the same time.
        needs: memory that the model takes in addition to its weight files.
        model: the model, used to suggest what would fit.
    """

    memory: int
    context: int
    batch: int
    needs: Needs
    model: ServedModel

    # a user who types a machine's memory does not ask for weights that fill it
    fills = False

    @property
    def cache(self) -> int:
        """Bytes of the caches of all conversations."""
        return self.batch * self.needs.cache

    @property
    def overhead(self) -> int:
        """Bytes of everything except weights and caches."""
        return self.needs.overhead(self.batch)

    def below(self, smallest: int, reachable: str) -> MoqaError:  # noqa: ARG002
        """See `Budget`."""
        parts = {"weights take at least": smallest, "the cache": self.cache, "the overhead": self.overhead}
        sizes = ", ".join(f"{part} {_mib(size)}" for part, size in parts.items())
        fitting = [f"in {_mib(sum(parts.values()))}", *self._smaller(smallest)]
        return MoqaError(f"{self.typed} is too little, {sizes}", f"it fits {' or '.join(fitting)}")

    def check(self, widths: Sequence[int], symmetric: bool, **candidates: Any) -> None:
        """Refuse a budget that no plan can reach, before the model is profiled.

        Args:
            widths: candidate widths.
            symmetric: whether grids have no zero-point.
            candidates: further arguments of `smallest_plan`.

        Raises:
            MoqaError: if the smallest plan does not fit, or a width cannot be stored.
        """
        stored = {*WIDTHS, KEEP_WIDTH} - ({1} if symmetric else set())
        if not set(widths) <= stored:
            typed = ",".join(map(str, widths))
            raise MoqaError(f"--widths {typed} cannot be planned", f"there are {', '.join(map(str, sorted(stored)))}")
        smallest = smallest_plan(self.model.view, widths, symmetric=symmetric, **candidates)
        if smallest > self.limit(0):
            raise self.below(smallest, "")

    def _smaller(self, smallest: int) -> Iterator[str]:
        """Options with fewer or shorter conversations, with which the smallest plan fits."""
        each = self.needs.cache + self.needs.around
        batch = (self.memory - smallest - self.needs.fixed) // each
        if batch > 0:
            yield f"with --batch {batch}"
        for halvings in range(1, self.context.bit_length()):
            context = self.context >> halvings
            needs = self.model.needs(context)
            if smallest + self.batch * needs.cache + needs.overhead(self.batch) <= self.memory:
                yield f"with --context {context}"
                return


def smallest_plan(
    view: ModelView,
    widths: Sequence[int],
    *,
    encodings: Sequence[str] = DEFAULT_ENCODINGS,
    groups: Sequence[int] = GROUPS,
    mixed: bool = True,
    floors: Mapping[str, int] = MappingProxyType({}),
    symmetric: bool = False,
) -> int:
    """Bytes of the weight files of the smallest plan, computed from a model's shapes.

    >>> smallest_plan(view, (2, 3, 4))
    9642944

    Args:
        view: the model; none of its weights are read.
        widths: candidate widths.
        encodings: candidate encodings.
        groups: candidate group sizes.
        mixed: whether the strategy chooses among these; else it takes the first of both.
        floors: role -> smallest width.
        symmetric: whether grids have no zero-point.
    """
    smallest = dict.fromkeys(ROLES, 0) | dict(floors)
    allowed = {role: tuple(width for width in widths if width >= floor) or (floor,) for role, floor in smallest.items()}
    schemes = {
        role: candidates(some, encodings, groups, symmetric=symmetric, mixed=mixed) for role, some in allowed.items()
    }
    units = {
        name: (unit.layer, unit.shape, min(schemes[unit.role], key=lambda scheme: scheme.stored_bytes(unit.shape)))
        for name, unit in view.units.items()
    }
    kept: dict[str, Entry] = {
        name: (torch.bfloat16 if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
        for name, tensor in view.kept().items()
    }
    return sum(shard.bytes for shard in shards(kept, len(view.blocks), units))


def memory_budget(
    model: str | Path | Profile, memory: str, *, context: int | None = None, batch: int = 1
) -> MemoryBudget:
    """Budget for a model that is served within a limit on all memory: weights, caches and everything else.

    >>> budget = memory_budget(profile, "1GiB", context=1024, batch=2)
    >>> moqa.plan(profile, budget).account.checkpoint <= budget.bytes
    True

    Args:
        model: folder or Hub id of the original model, or a profile of it.
        memory: limit, e.g. 8GiB; `auto` means the memory that is free on this machine now.
        context: tokens of a conversation; None means 8192, or the model's context if that is shorter.
        batch: conversations at the same time.

    Raises:
        MoqaError: if the memory limit cannot be parsed, the free memory cannot be determined, the model is not where it
            was, or its context is shorter.
    """
    limit = free_memory() if memory == AUTO else parse_size(memory, "--fit")
    served = _profiled(model, memory) if isinstance(model, Profile) else ServedModel(model)
    longest = served.context or math.inf
    if context is not None and context > longest:
        raise MoqaError(f"--fit {memory} --context {context} is too long", f"the model's context is {longest} tokens")
    tokens = context or int(min(DEFAULT_CONTEXT, longest))
    needs = served.needs(tokens)
    free = f" ({_mib(limit)} free)" if memory == AUTO else ""
    return MemoryBudget(
        typed=f"--fit {memory}{free} --context {tokens} --batch {batch}",
        bytes=limit - needs.overhead(batch) - batch * needs.cache,
        memory=limit, context=tokens, batch=batch, needs=needs, model=served,
    )  # fmt: skip


def _profiled(profile: Profile, memory: str) -> ServedModel:
    record = profile.record
    try:
        served = ServedModel(profile.original)
    except MoqaError as error:
        what = f"--fit {memory} needs the configuration of {record.model}, the model of the profile {profile.folder}"
        raise MoqaError(what, str(error)) from None
    if {unit.name: unit.shape for unit in record.units} != {u.name: u.shape for u in served.view.units.values()}:
        raise MoqaError(f"--fit {memory}: {record.model} is not the model of {profile.folder}", "its units differ")
    return served


def _mib(size: int) -> str:
    return f"{math.ceil(size / 2**20)} MiB"
