"""Input statistics of the units of a block: weighted Gram matrices."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from moqa.calibration.routed import routed
from moqa.memory.process import give_back
from moqa.models.experts import Experts, ParameterWeights, projection_rows, weights_from, with_bias
from moqa.models.layerwise import LayerwiseModel
from moqa.models.layout import Convolution, input_rows, layout_of
from moqa.models.precision import in_stored_precision
from moqa.models.products import fast_sums, in_blocks
from moqa.models.slopes import COMBINED, slopes
from moqa.models.units import Unit
from moqa.models.view import ModelView
from moqa.models.watch import watching
from moqa.storage.resumable import ResumableRun

# side of the smallest tile of a Gram matrix: smaller tiles skip more of its upper triangle, larger ones multiply faster
_TILE = 256
# predictions (tokens of a language model) in which the inputs of an expert are looked up at a time
LOOKUP_TOKENS = 2**14
# one window in this many is held out to compare methods
HELD_OUT_EVERY = 8


class InputStatistics:
    """Statistics of the inputs that units of one input space share.

    >>> inputs = InputStatistics(1024)
    >>> inputs.add(torch.randn(256, 1024), share=1.0, check=False)
    >>> inputs.energy.shape, inputs.tokens
    (torch.Size([1024]), 256)

    Args:
        features: number of features of an input.

    Attributes:
        check: held-out inputs, on which results are compared.
        tokens: number of inputs that are fitted on.
        slopes: [2, width, width] Gram matrices of the slopes of the activation for the units' outputs, where these are
            gates and ups and slopes were asked for, float32.
    """

    def __init__(self, features: int) -> None:
        self._features, self.check, self.tokens = features, HeldOutInputs(features), 0
        self.slopes: Tensor | None = None
        self._sum: Tensor | None = None  # the lower triangle, in tiles

    @property
    def fit(self) -> Tensor:
        """[in, in] sum of x x^T over the inputs that are fitted on, float32."""
        return torch.zeros(self._features, self._features) if self._sum is None else _whole(self._sum)

    @fit.setter
    def fit(self, gram: Tensor) -> None:
        self._sum = gram

    @property
    def energy(self) -> Tensor:
        """[in] the diagonal of `fit`."""
        return torch.zeros(self._features) if self._sum is None else self._sum.diagonal()

    def add(self, x: Tensor, share: float, check: bool, tokens: int | None = None) -> None:
        """Add [rows, in] inputs, each with weight `share`; rows after the first `tokens` are zeros and not counted."""
        if check:
            self.check.add(x, share)
        else:
            self._sum = _add_squares(self._sum, x, share)
            self.tokens += len(x) if tokens is None else tokens

    def add_slopes(self, gate: Tensor, up: Tensor) -> None:
        """Add slopes for gates and for ups, [tokens, width] each."""
        if self.slopes is None:
            self.slopes = torch.zeros(2, gate.shape[1], gate.shape[1])
        with fast_sums():
            for total, one in zip(self.slopes, (gate, up), strict=True):
                total.addmm_(one.T, one)


class HeldOutInputs:
    """Held-out inputs: the inputs themselves while they are few, then their Gram matrix.

    Args:
        features: number of features of an input.
    """

    def __init__(self, features: int) -> None:
        self._count = 0
        # one block that takes memory as it is written: many small long-lived tensors would fragment the heap
        self._rows = torch.empty(features, features)
        self._sum: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": self._rows[: self._count].clone()}

    def add(self, x: Tensor, share: float) -> None:
        """Add [tokens, in] inputs, each with weight `share`."""
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
        """[in, in] sum of x x^T over them, float32."""
        if self._sum is not None:
            return _whole(self._sum)
        rows = self._rows[: self._count]
        return rows.T @ rows

    def errors(self, difference: Tensor, outputs: Tensor | None = None) -> Tensor:
        """[out] squared errors of the outputs for these inputs if the weights change by `difference`, [out, in].

        With the Gram matrix of the gradients at the outputs, [out, out], those of single outputs do not matter: their
        sum is that of the squared changes of the loss.
        """
        if self._sum is None:
            errors = torch.zeros(len(difference))
            with fast_sums():
                for block in in_blocks(self._count):
                    change = self._rows[block] @ difference.T
                    errors += (change.square() if outputs is None else (change @ outputs).mul_(change)).sum(0)
            return errors
        # errors lie in directions in which inputs hardly vary: rounding the Gram matrix to bfloat16 would distort them
        other = difference if outputs is None else outputs @ difference
        return (difference @ self.gram).mul_(other).sum(1)


def _add_squares(total: Tensor | None, x: Tensor, share: float) -> Tensor:
    """Add x^T x to the lower triangle of [in, in], in tiles; None means zero."""
    total = torch.zeros(x.shape[1], x.shape[1]) if total is None else total
    with fast_sums():
        _add_triangle(total, x, share)
    return total


def _add_triangle(total: Tensor, x: Tensor, share: float) -> None:
    """By recursive halving: few shapes of products, mostly large ones, which multiply fastest."""
    tiles = -(-len(total) // _TILE)
    if tiles == 1:
        total.add_(x.T @ x, alpha=share)
        return
    middle = tiles // 2 * _TILE
    total[middle:, :middle].add_(x[:, middle:].T @ x[:, :middle], alpha=share)
    _add_triangle(total[:middle, :middle], x[:, :middle], share)
    _add_triangle(total[middle:, middle:], x[:, middle:], share)


def _whole(lower: Tensor) -> Tensor:
    """The same matrix with the tiles above the diagonal filled in, in place."""
    for begin in range(_TILE, lower.shape[1], _TILE):
        tile = slice(begin, begin + _TILE)
        lower[:begin, tile] = lower[tile, :begin].T
    return lower


@dataclass(frozen=True)
class CalibrationBatch:
    """A batch of samples at the input of a block.

    Attributes:
        hidden: hidden states, e.g. [batch, context, features].
        share: weight of each token.
        check: whether the samples are held out from fitting.
    """

    hidden: Tensor
    share: float = 1.0
    check: bool = False


def input_space(unit: Unit) -> str:
    """Name of a unit's inputs; an expert's gate and up projections share one input space."""
    if unit.expert is not None:
        return f"{unit.module}.{unit.expert}.{'inner' if unit.projection == 'down_proj' else 'in'}"
    return unit.name


def by_input(units: Iterable[Unit]) -> dict[str, list[Unit]]:
    """Input space -> units that share it, both in the order of the units.

    >>> [len(sharing) for sharing in by_input(view.block_units(0)).values()][-2:]
    [2, 1]
    """
    spaces: dict[str, list[Unit]] = {}
    for unit in units:
        spaces.setdefault(input_space(unit), []).append(unit)
    return spaces


class BlockInputs:
    """Input statistics of all units of a block; those of its experts are computed for some experts at a time.

    >>> inputs = BlockInputs(view, stages, 0, [CalibrationBatch(hidden)], work)
    >>> inputs.linear["model.layers.0.self_attn.q_proj"].tokens
    32
    >>> sum(found.tokens for name, found in inputs.experts(range(16)).items() if name.endswith(".in"))
    64

    Args:
        view: the model.
        stages: of the same model.
        layer: index of the block, with its present weights.
        parts: samples at the block's input; read once.
        work: where the calls of the experts are saved until `drop`.
        name: of what is saved; unique among those that share `work`.
        with_slopes: whether to sum up slopes of the activation, too.
        affinity: power of the gate weights by which inputs of experts are multiplied (`Method.affinity`).
    """

    def __init__(
        self, view: ModelView, stages: LayerwiseModel, layer: int, parts: Iterable[CalibrationBatch],
        work: ResumableRun, name: str = "experts", *, with_slopes: bool = False, affinity: float = 1.0,
    ) -> None:  # fmt: skip
        self._open(view, layer, work, name, with_slopes)
        self._affinity = affinity
        later = False
        # inputs of the current batch with their layout, and the space that counts them: q, k and v mostly share one
        shared: list[tuple[Tensor, Convolution | None, str]] = []
        gates: dict[str, Tensor] = {}

        def linear(unit: Unit, x: Tensor, out: Tensor) -> None:
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
            if with_slopes and not part.check and unit.role != "attention" and unit.projection in COMBINED:
                owner = unit.module.rpartition(".")[0]
                activation = getattr(view.module(owner), "act_fn", None)
                if unit.projection == COMBINED[0]:
                    gates[owner] = out
                elif owner in gates and activation is not None:
                    found.add_slopes(*_slopes(activation, gates.pop(owner), out, part.share))
            later |= recorder is not None and recorder.called

        with torch.no_grad(), in_stored_precision(view, layer), watching(view, layer, None, linear):
            recorder = None if self._path is None else _Recorder(self._module, self._add)
            with weights_from(self._module, recorder):
                for part in parts:
                    # a new tensor, because a view would keep the hidden states alive
                    self._parts.append(replace(part, hidden=part.hidden.new_empty(0)))
                    stages.run_block(layer, part.hidden)
                    shared.clear()
                    if recorder is not None:
                        # experts may be skipped only if no unit of the block depends on their output
                        recorder.exact, recorder.called = later, False

    @classmethod
    def recorded(
        cls, view: ModelView, layer: int, parts: Sequence[CalibrationBatch], work: ResumableRun, name: str = "experts",
        *, with_slopes: bool = False, affinity: float = 1.0,
    ) -> "BlockInputs":  # fmt: skip
        """Input statistics of experts whose calls are already saved in `work`, by any process; no other units.

        >>> inputs = BlockInputs(view, stages, 0, [CalibrationBatch(hidden)], work, "recorded")
        >>> again = BlockInputs.recorded(view, 0, inputs.parts, work, "recorded")
        >>> again.experts([7]).keys() == inputs.experts([7]).keys()
        True
        """
        inputs = cls.__new__(cls)
        inputs._open(view, layer, work, name, with_slopes)
        inputs._affinity = affinity
        inputs._parts += parts
        return inputs

    @property
    def parts(self) -> tuple[CalibrationBatch, ...]:
        """The batches with their shares and roles, without hidden states."""
        return tuple(self._parts)

    def _open(self, view: ModelView, layer: int, work: ResumableRun, name: str, with_slopes: bool) -> None:
        self._view, self._layer, self._path = view, layer, view.experts_path(layer)
        self._module: Experts = None if self._path is None else view.module(self._path)
        self._work, self._name, self._parts = work, f".{name}", list[CalibrationBatch]()
        self._slopes = with_slopes
        self.linear: dict[str, InputStatistics] = {}
        view.need(layer)

    def _add(self, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        self._work.save(f"{self._name}-{len(self._parts) - 1}", {"x": hidden, "index": index, "gate": weights})

    @torch.no_grad()
    def experts(self, which: Sequence[int]) -> dict[str, InputStatistics]:
        """Statistics of some experts by input space; experts without tokens are left out.

        Each input is weighted by the gate weight of its output, to the power `affinity`.
        """
        found: dict[str, InputStatistics] = {}
        rows = {} if self._path is None else projection_rows(self._module)
        with in_stored_precision(self._view, self._layer):
            weights = ParameterWeights(self._module)
        batches = LOOKUP_TOKENS // self._view.task.batch_size
        for first in range(0, len(self._parts), batches):
            numbers = range(first, min(first + batches, len(self._parts)))
            calls = [(self._parts[number], self._work.load(f"{self._name}-{number}")) for number in numbers]
            for expert, check in product(which, (False, True)):
                # freed memory that stays in the heap adds to the peak; returning it costs as much as a small sum
                if expert % 16 == 0 and not check:
                    give_back()
                chosen = [(part.share, call) for part, call in calls if part.check == check]
                for x, gate, tokens in routed(expert, chosen, self._affinity):
                    gate_up = with_bias(self._module, "gate_up_proj", expert, weights.gate_up(expert, x))
                    inner = self._module._apply_gate(gate_up)
                    for space, seen in (("in", x), ("inner", inner)):
                        name = f"{self._path}.{expert}.{space}"
                        found.setdefault(name, InputStatistics(seen.shape[1])).add(seen * gate, 1.0, check, tokens)
                    if self._slopes and not check:
                        slope = slopes(self._module._apply_gate, gate_up).mul_(gate)
                        found[f"{self._path}.{expert}.in"].add_slopes(*(slope[:, rows[name]] for name in COMBINED))
        return found

    def drop(self) -> None:
        """Remove the saved calls."""
        self._work.remove(f"{self._name}-*")


def _slopes(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor, share: float) -> Iterable[Tensor]:
    """Slopes of a dense feed-forward part for gates and for ups, [tokens, width] each."""
    both = torch.cat([gate.flatten(0, -2), up.flatten(0, -2)], 1)

    def combine(x: Tensor) -> Tensor:
        of_gate, of_up = x.chunk(2, 1)
        return activation(of_gate) * of_up

    return slopes(combine, both).mul_(share**0.5).chunk(2, 1)


class _Recorder(ParameterWeights):
    """Replaces the experts of a block and saves what they are called with."""

    def __init__(self, module: Experts, add: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        super().__init__(module)
        self._add, self.exact, self.called = add, True, False

    def run(self, module: Experts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor | None:  # noqa: ARG002
        """Zeros instead of the experts' output, unless units depend on it."""
        self._add(hidden, index, weights)
        self.called = True
        return None if self.exact else torch.zeros_like(hidden)
