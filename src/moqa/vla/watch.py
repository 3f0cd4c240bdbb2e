"""What a policy computes for some observations, where it can be compared."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moqa.policies.adapter import Meeting
from moqa.policies.members import adapter_of
from moqa.tasks import task_of


@dataclass(frozen=True)
class Seen:
    """What a policy computes for some observations.

    Attributes:
        projected: [tokens, features] where vision meets language.
        blocks: [rows, features] output of each block that was asked for, by path.
        actions: [observations, chunk, action].
    """

    projected: Tensor
    blocks: dict[str, Tensor]
    actions: Tensor


class PolicyWatch:
    """Runs a policy and keeps what passes the places at which it is compared.

    >>> seen = PolicyWatch(view.model).run(rows, ["projector"])  # doctest: +SKIP
    >>> seen.actions.shape  # doctest: +SKIP
    torch.Size([64, 8, 4])

    Args:
        model: the policy; its weights may be packed.

    Attributes:
        meeting: where vision meets language.
        paths: of all blocks.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._task = model, task_of(model.config)
        self.meeting: Meeting = adapter_of(model.config).meeting(model)
        self.paths = self._task.blocks(model)
        self._outputs: dict[str, str] = {}  # path of a block -> of the module whose output is the block's

    @torch.no_grad()
    def run(self, rows: Tensor, blocks: list[str], projected: bool = True) -> Seen:
        """Run the policy.

        Args:
            rows: [observations, numbers].
            blocks: paths of the blocks whose outputs are kept.
            projected: whether projected tokens are kept.
        """
        self._outputs = self._outputs or self._find_outputs(rows[:1])
        outputs = {path: self._outputs[path] for path in blocks}
        places = {*outputs.values(), *([self.meeting.projected] if projected else [])}
        kept: dict[str, list[Tensor]] = {path: [] for path in places}
        with self._kept(kept):
            actions = [self._task.call(self._model, batch).float() for batch in self._task.batches(rows)]
        found = {place: torch.cat(parts) for place, parts in kept.items()}
        tokens = found[self.meeting.projected] if projected else torch.empty(0, 0)
        return Seen(tokens, {path: found[place] for path, place in outputs.items()}, torch.cat(actions))

    def _find_outputs(self, rows: Tensor) -> dict[str, str]:
        """A block itself, or the module in it that is called last where a policy calls the modules of its blocks."""
        called: list[str] = []
        hooks = [
            module.register_forward_hook(lambda *_, name=name: called.append(name))
            for name, module in self._model.named_modules()
        ]
        try:
            self._task.call(self._model, rows)
        finally:
            for hook in hooks:
                hook.remove()
        return {
            path: path if path in called else [name for name in called if name.startswith(f"{path}.")][-1]
            for path in self.paths
        }

    @torch.no_grad()
    def words(self, rows: Tensor) -> Tensor:
        """[words, features] embeddings of the words that the policy reads in these observations."""
        if not self.meeting.words:
            return torch.empty(0, 0)
        table: Any = self._model.get_submodule(self.meeting.words)
        ids: list[Tensor] = []
        hook = table.register_forward_pre_hook(lambda _, args: ids.append(args[0].unique()))
        try:
            for batch in self._task.batches(rows):
                self._task.call(self._model, batch)
        finally:
            hook.remove()
        found: Tensor = table(torch.cat(ids).unique()).float()
        return found

    @contextmanager
    def _kept(self, kept: dict[str, list[Tensor]]) -> Iterator[None]:
        def keeps(path: str) -> Any:
            def hook(_: nn.Module, __: Any, out: Any) -> None:
                # of a backbone whose layers are asked for by name, the last one
                first = out[0] if isinstance(out, tuple) else [*out.values()][-1] if isinstance(out, dict) else out
                # convolutions have their features second
                first = first.movedim(1, -1) if first.dim() == 4 else first
                kept[path].append(first.detach().float().flatten(0, -2))

            return hook

        hooks = [self._model.get_submodule(path).register_forward_hook(keeps(path)) for path in kept]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
