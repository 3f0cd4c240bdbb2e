"""What the units of a layer are multiplied with: weighted Gram matrices of their inputs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from moqa.calibration.routed import routed
from moqa.memory.process import give_back
from moqa.models.experts import Experts, ParameterWeights, weights_from, with_bias
from moqa.models.layerwise import LayerwiseModel
from moqa.models.layout import Convolution, input_rows, layout_of
from moqa.models.precision import in_stored_precision
from moqa.models.products import fast_sums, in_blocks
from moqa.models.units import Unit
from moqa.models.view import ModelView
from moqa.models.watch import watching
from moqa.storage.resumable import ResumableRun

# features of the smallest block of a Gram matrix: smaller ones leave more of it out, larger ones multiply faster
_BLOCK = 256
# samples in which an expert's inputs are looked for together
TOGETHER = 2**14
# one window in this many decides between methods and is not fitted on
HELD_OUT_EVERY = 8


class InputStatistics:
    """What the units of one input space were multiplied with.

    >>> inputs = InputStatistics(1024)
    >>> inputs.add(torch.randn(256, 1024), share=1.0, check=False)
    >>> inputs.energy.shape, inputs.tokens
    (torch.Size([1024]), 256)

    Args:
        features: of an input.

    Attributes:
        check: other samples, by which results are compared.
        tokens: how many inputs may be fitted on.
    """

    def __init__(self, features: int) -> None:
        self._features, self.check, self.tokens = features, HeldOutInputs(features), 0
        self._sum: Tensor | None = None  # the triangle below the diagonal, in blocks

    @property
    def fit(self) -> Tensor:
        """[in, in] sum of x x^T over samples that may be fitted on, float32."""
        return torch.zeros(self._features, self._features) if self._sum is None else _whole(self._sum)

    @fit.setter
    def fit(self, gram: Tensor) -> None:
        self._sum = gram

    @property
    def energy(self) -> Tensor:
        """[in] the diagonal of `fit`."""
        return torch.zeros(self._features) if self._sum is None else self._sum.diagonal()

    def add(self, x: Tensor, share: float, check: bool, tokens: int | None = None) -> None:
        """Add [tokens, in] inputs whose squares count `share` each; if `tokens` are fewer, the rest are zeros."""
        if check:
            self.check.add(x, share)
        else:
            self._sum = _add_squares(self._sum, x, share)
            self.tokens += len(x) if tokens is None else tokens


class HeldOutInputs:
    """InputStatistics that nothing is fitted on: as they are while they are few, then their squares.

    Args:
        features: of an input.
    """

    def __init__(self, features: int) -> None:
        self._count = 0
        # memory that is used when it is written: many small pieces that stay would lie between others that do not
        self._rows = torch.empty(features, features)
        self._sum: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": self._rows[: self._count].clone()}

    def add(self, x: Tensor, share: float) -> None:
        """Add [tokens, in] inputs whose squares count `share` each."""
        last = self._count + len(x)
        if self._sum is None and last <= len(self._rows):
            torch.mul(x, share**0.5, out=self._rows[self._count : last])
            self._count = last
            return
        if self._count:
            self._sum = _add_squares(self._sum, self._rows[: self._count], 1.0)
        self._rows, self._count = self._rows[:0].clone(), 0
        self._sum = _add_squares(self._sum, x, share)

    @property
    def gram(self) -> Tensor:
        """[in, in] sum of their x x^T, float32."""
        if self._sum is not None:
            return _whole(self._sum)
        rows = self._rows[: self._count]
        return rows.T @ rows

    def errors(self, difference: Tensor) -> Tensor:
        """[out] squared norms of what a difference [out, in] in the weights makes in each output for these inputs."""
        if self._sum is None:
            found = torch.zeros(len(difference))
            with fast_sums():
                for block in in_blocks(self._count):
                    found += (self._rows[block] @ difference.T).square_().sum(0)
            return found
        # errors lie where inputs hardly vary: rounding these squares to bfloat16 would not be small beside them
        return (difference @ self.gram).mul_(difference).sum(1)


def _add_squares(total: Tensor | None, x: Tensor, share: float) -> Tensor:
    """Add x^T x to the blocks of [in, in] that hold its triangle below the diagonal; None is zero."""
    total = torch.zeros(x.shape[1], x.shape[1]) if total is None else total
    with fast_sums():
        _add_triangle(total, x, share)
    return total


def _add_triangle(total: Tensor, x: Tensor, share: float) -> None:
    """In halves: products of few shapes, of which large ones multiply fastest."""
    blocks = -(-len(total) // _BLOCK)
    if blocks == 1:
        total.add_(x.T @ x, alpha=share)
        return
    middle = blocks // 2 * _BLOCK
    total[middle:, :middle].add_(x[:, middle:].T @ x[:, :middle], alpha=share)
    _add_triangle(total[:middle, :middle], x[:, :middle], share)
    _add_triangle(total[middle:, middle:], x[:, middle:], share)


def _whole(lower: Tensor) -> Tensor:
    """The same matrix with the blocks above the diagonal filled in."""
    for begin in range(_BLOCK, lower.shape[1], _BLOCK):
        block = slice(begin, begin + _BLOCK)
        lower[:begin, block] = lower[block, :begin].T
    return lower


@dataclass(frozen=True)
class CalibrationBatch:
    """Some samples on their way through the model.

    Attributes:
        hidden: [batch, context, features] input of the next layer.
        share: how much each token counts.
        check: whether the samples are kept from fitting.
    """

    hidden: Tensor
    share: float = 1.0
    check: bool = False


def input_space(unit: Unit) -> str:
    """Name of what a unit is multiplied with; an expert's gate and up projection share theirs."""
    if unit.expert is not None:
        return f"{unit.module}.{unit.expert}.{'inner' if unit.projection == 'down_proj' else 'in'}"
    return unit.name


def by_input(units: Iterable[Unit]) -> dict[str, list[Unit]]:
    """Input space -> the units that share it, both in the order of the units.

    >>> [len(sharing) for sharing in by_input(view.block_units(0)).values()][-2:]
    [2, 1]
    """
    found: dict[str, list[Unit]] = {}
    for unit in units:
        found.setdefault(input_space(unit), []).append(unit)
    return found


class BlockInputs:
    """What all units of a decoder layer are multiplied with; of its experts, some at a time.

    >>> inputs = BlockInputs(view, stages, 0, [CalibrationBatch(stages.embed(tokens))], work)
    >>> inputs.linear["model.layers.0.self_attn.q_proj"].tokens
    2048
    >>> inputs.experts([7])["model.layers.0.mlp.experts.7.in"].tokens
    262

    Args:
        view: the model.
        stages: of the same model.
        layer: index of the decoder layer, with the weights that inputs are wanted for.
        parts: samples, at the layer's input; they are gone through once.
        work: where the experts' own inputs are put aside until `drop`.
        name: of what is put aside, another for each of those that share `work`.
    """

    def __init__(
        self, view: ModelView, stages: LayerwiseModel, layer: int, parts: Iterable[CalibrationBatch],
        work: ResumableRun, name: str = "experts",
    ) -> None:  # fmt: skip
        self._open(view, layer, work, name)
        later = False
        # of the samples on their way: input, as rows of which layout -> the space that it is counted for; q, k and v
        # mostly share theirs
        shared: list[tuple[Tensor, Convolution | None, str]] = []

        def linear(unit: Unit, x: Tensor, _: Tensor) -> None:
            nonlocal later
            part, space, module = self._parts[-1], input_space(unit), view.module(unit.module)
            layout = layout_of(module)
            counted = next((name for seen, way, name in shared if seen is x and way == layout), space)
            found = self.linear.setdefault(space, self.linear.get(counted) or InputStatistics(unit.shape[1]))
            if counted == space:
                found.add(input_rows(module, x), part.share, part.check)
                shared.append((x, layout, space))
            elif found is not self.linear[counted]:
                raise RuntimeError(f"{space} shares its input with {counted} for some samples only")
            later |= recorder is not None and recorder.called

        with torch.no_grad(), in_stored_precision(view, layer), watching(view, layer, None, linear):
            recorder = None if self._path is None else _Recorder(self._module, self._add)
            with weights_from(self._module, recorder):
                for part in parts:
                    # not a view, which would keep what it is a view of
                    self._parts.append(replace(part, hidden=part.hidden.new_empty(0)))
                    stages.run_block(layer, part.hidden)
                    shared.clear()
                    if recorder is not None:
                        # nothing but the output of the layer, which nobody wants here, may depend on its experts
                        recorder.exact, recorder.called = later, False

    @classmethod
    def recorded(
        cls, view: ModelView, layer: int, parts: Sequence[CalibrationBatch], work: ResumableRun, name: str = "experts"
    ) -> "BlockInputs":
        """Those of experts whose calls lie in `work` already, put aside by any process; none of other units.

        >>> BlockInputs.recorded(view, 0, inputs.parts, work).experts([7]).keys() == inputs.experts([7]).keys()
        True
        """
        found = cls.__new__(cls)
        found._open(view, layer, work, name)
        found._parts += parts
        return found

    @property
    def parts(self) -> tuple[CalibrationBatch, ...]:
        """The samples' shares and roles, without their hidden states."""
        return tuple(self._parts)

    def _open(self, view: ModelView, layer: int, work: ResumableRun, name: str) -> None:
        self._view, self._layer, self._path = view, layer, view.experts_path(layer)
        self._module: Experts = None if self._path is None else view.module(self._path)
        self._work, self._name, self._parts = work, name, list[CalibrationBatch]()
        self.linear: dict[str, InputStatistics] = {}
        view.need(layer)

    def _add(self, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        self._work.save(f"{self._name}-{len(self._parts) - 1}", {"x": hidden, "index": index, "gate": weights})

    @torch.no_grad()
    def experts(self, which: Sequence[int]) -> dict[str, InputStatistics]:
        """InputStatistics of some experts, by input space; those that no token reached have none.

        Each input is counted by the gate weight that its output gets.
        """
        found: dict[str, InputStatistics] = {}
        with in_stored_precision(self._view, self._layer):
            weights = ParameterWeights(self._module)
        together = TOGETHER // self._view.task.batch_size
        for first in range(0, len(self._parts), together):
            numbers = range(first, min(first + together, len(self._parts)))
            calls = [(self._parts[number], self._work.load(f"{self._name}-{number}")) for number in numbers]
            for expert, check in product(which, (False, True)):
                # what sums left in the heap adds to the most that is taken; each time costs as much as a small sum
                if expert % 16 == 0 and not check:
                    give_back()
                chosen = [(part.share, call) for part, call in calls if part.check == check]
                for x, gate, tokens in routed(expert, chosen):
                    gate_up = with_bias(self._module, "gate_up_proj", expert, weights.gate_up(expert, x))
                    inner = self._module._apply_gate(gate_up)
                    for space, seen in (("in", x), ("inner", inner)):
                        name = f"{self._path}.{expert}.{space}"
                        found.setdefault(name, InputStatistics(seen.shape[1])).add(seen * gate, 1.0, check, tokens)
        return found

    def drop(self) -> None:
        """Remove what was put aside."""
        self._work.remove(f"{self._name}-*")


class _Recorder(ParameterWeights):
    """Stands in for a layer's experts and records what they are called with."""

    def __init__(self, module: Experts, add: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        super().__init__(module)
        self._add, self.exact, self.called = add, True, False

    def run(self, module: Experts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor | None:  # noqa: ARG002
        """Nothing instead of the experts' output, unless something depends on it."""
        self._add(hidden, index, weights)
        self.called = True
        return None if self.exact else torch.zeros_like(hidden)
