"""What happens to a policy if some of its units lose precision, or get gradients."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moqa.format.scheme import Scheme
from moqa.kernels import PackedMatrix
from moqa.methods import METHODS
from moqa.models.units import Unit
from moqa.models.view import ModelView
from moqa.vla.alignment import LEVELS, action_shift, layer_shift, module_shift, token_shift
from moqa.vla.watch import PolicyWatch, Seen

# the three levels of alignment, then the actions
SHIFTS = (*LEVELS, "action")
# widths at which whole parts are compared
PART_WIDTHS = (2, 3, 4, 6, 8)


class ShiftComparison:
    """Compares a policy that has lost precision with itself, on some observations.

    >>> comparison = ShiftComparison(view, rows)  # doctest: +SKIP
    >>> comparison.shifts({unit.name: Scheme(width=3) for unit in view.block_units(0)}).keys()  # doctest: +SKIP
    dict_keys(['module', 'layer', 'token', 'action'])

    Args:
        view: the policy.
        rows: [observations, numbers].
    """

    def __init__(self, view: ModelView, rows: Tensor) -> None:
        self._view, self._rows, self._watch = view, rows, PolicyWatch(view.model)
        self._original = self._watch.run(rows, self._watch.paths)
        self._words = self._watch.words(rows)

    def shifts(self, schemes: Mapping[str, Scheme]) -> dict[str, float]:
        """The three shifts of alignment and that of the actions, if some units are rounded as these schemes do.

        The layer's shift is the mean over the blocks that hold the units.
        """
        units = [self._view.units[name] for name in schemes]
        with rounded(self._view, schemes):
            blocks = sorted({unit.layer for unit in units})
            return self.against(self._view.model, [self._watch.paths[block] for block in blocks])

    def against(self, model: Any, blocks: Sequence[str] | None = None) -> dict[str, float]:
        """The shifts of another policy of the same kind, whose weights may be packed.

        Args:
            model: the other policy.
            blocks: paths of those whose outputs are compared; None means all.
        """
        watch = self._watch if model is self._view.model else PolicyWatch(model)
        moved: Seen = watch.run(self._rows, list(self._watch.paths if blocks is None else blocks))
        tokens = self._original.projected
        layers = [layer_shift(self._original.blocks[path], out) for path, out in moved.blocks.items()]
        return {
            "module": module_shift(tokens, moved.projected), "layer": sum(layers) / max(len(layers), 1),
            "token": token_shift(tokens, moved.projected, self._words),
            "action": action_shift(self._original.actions, moved.actions),
        }  # fmt: skip


@contextmanager
def rounded(view: ModelView, schemes: Mapping[str, Scheme]) -> Iterator[None]:
    """Inside this context, some units have the weights that plain rounding would store."""
    before: list[tuple[Unit, Tensor]] = []
    store = METHODS["rtn"].store
    assert store is not None
    try:
        for name, scheme in schemes.items():
            unit = view.units[name]
            weight = view.weight(unit)
            before.append((unit, weight.clone()))
            if not scheme.is_unquantized:
                view.set_weight(unit, PackedMatrix(scheme, unit.shape, store(weight, scheme)).dense().to(weight.dtype))
        yield
    finally:
        for unit, weight in before:
            view.set_weight(unit, weight)


def gradients(view: ModelView, rows: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """How strongly the error of the actions pulls at each part.

    Args:
        view: the policy.
        rows: [observations, numbers].
        actions: [observations, horizon, action] of the expert.

    Returns:
        [parts] root mean square of the gradients of the units' weights in each part, in the order of `parts_in`, and
        [2] of those at the projected tokens and at the embedded words (0 where there are none).
    """
    watch, parts = PolicyWatch(view.model), parts_in(view)
    places = [path for path in (watch.meeting.projected, watch.meeting.words) if path]
    outputs: dict[str, list[Tensor]] = {path: [] for path in places}
    units = {part: [unit for unit in view.units.values() if unit.role == part] for part in parts}
    parameters = {unit.parameter: view.model.get_parameter(unit.parameter) for unit in view.units.values()}
    embedding = [view.model.get_parameter(f"{watch.meeting.words}.weight")] if watch.meeting.words else []

    def keep(path: str, out: Tensor) -> None:
        if out.requires_grad:
            out.retain_grad()
            outputs[path].append(out)

    hooks = [
        view.module(path).register_forward_hook(lambda _, __, out, path=path: keep(path, out)) for path in places
    ]  # fmt: skip
    every = [*parameters.values(), *embedding]
    try:
        for parameter in every:
            parameter.requires_grad_(True)
        for some, wanted in zip(view.task.batches(rows), view.task.batches(actions), strict=True):
            found = view.task.call(view.model, some)
            steps = min(found.shape[1], wanted.shape[1])
            if found.requires_grad:  # some policies act without passing gradients on
                (found[:, :steps] - wanted[:, :steps]).square().sum(-1).mean().backward()
        of_parts = [
            torch.cat([_gradient(parameters[name]) for name in dict.fromkeys(unit.parameter for unit in some)])
            for some in units.values()
        ]  # fmt: skip
        of_places = [
            torch.cat([out.grad.flatten() for out in outputs.get(path, []) if out.grad is not None] or [torch.zeros(1)])
            for path in (watch.meeting.projected, watch.meeting.words or "-")
        ]
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in every:
            parameter.grad = None
            parameter.requires_grad_(False)
    return _rms(of_parts), _rms(of_places)


def parts_in(view: ModelView) -> list[str]:
    """The parts that hold units, in the order in which an observation passes them."""
    return list(dict.fromkeys(unit.role for unit in view.units.values()))


def _gradient(parameter: Tensor) -> Tensor:
    """Flat gradient; zeros of a layer whose output the policy does not use."""
    return torch.zeros(parameter.numel()) if parameter.grad is None else parameter.grad.flatten()


def _rms(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.square().mean().sqrt() for value in values])
