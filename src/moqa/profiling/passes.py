"""The passes of a measurement, one distribution and one block at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moqa.calibration.hidden import HiddenStates, run_back
from moqa.calibration.inputs import BlockInputs, CalibrationBatch
from moqa.calibration.outputs import GradientSketch, adds_to_output
from moqa.execution import Workspace
from moqa.models.layerwise import LayerwiseModel
from moqa.models.layout import input_rows, output_rows
from moqa.models.precision import in_stored_precision
from moqa.models.units import Unit
from moqa.models.view import ModelView
from moqa.models.watch import watching
from moqa.profiling.record import SELF
from moqa.profiling.selfsample import draw
from moqa.profiling.sensitivity import ErrorSettings, Sensitivity, compared_errors, relative_errors
from moqa.profiling.significance import LayerStatistics, layer_similarity
from moqa.storage.resumable import ResumableRun

# samples of a distribution by which units are compared
_COMPARED_SAMPLES = 64


@dataclass(frozen=True)
class BlockPass:
    """One distribution's pass over one block.

    Attributes:
        layer: index of the block.
        how: how errors are made and measured.
        name: of the distribution; empty for a pass over the weights alone.
        shape: of the distribution's inputs.
        dtype: of the distribution's inputs.
        experts: experts whose sensitivity is measured; None means all.
    """

    layer: int
    how: ErrorSettings
    name: str = ""
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.int64
    experts: tuple[int, ...] | None = None

    def samples(self, workspace: Workspace) -> "ProfiledSamples":
        """The distribution, whose hidden states are already saved."""
        return ProfiledSamples.of(workspace, self.name, torch.zeros(self.shape, dtype=self.dtype))


def parts(tokens: Tensor, *, own: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Samples that errors are fitted on, samples that they are measured on, and those that only significance needs.

    >>> [part.tolist() for part in parts(torch.arange(8))]
    [[0, 2, 4, 6], [1, 5], [3, 7]]
    >>> [part.tolist() for part in parts(torch.arange(8), own=True)]
    [[0, 2, 4, 6], [1, 3, 5, 7], []]

    A method leaves less error on the samples that it is fitted on than on others. A backward pass and the effects of
    all errors take most of a profile's time, and a quarter of 64 samples orders the units of a text as well as half of
    them (docs/results/cost.md). The model's own text is as varied as all that it was trained for: there a quarter may
    lack what an expert is for. More samples than 64 are for quantizing, which gains from them.
    """
    if len(tokens) == 1:
        return tokens, tokens, tokens[1:]
    number, step = torch.arange(len(tokens)), compared_every(len(tokens))
    fitted, measured = number % (2 * step) == 0, number % ((2 if own else 4) * step) == step
    return tokens[fitted], tokens[measured], tokens[~(fitted | measured)]


def compared_every(samples: int) -> int:
    """Of how many samples one is for comparing units.

    >>> compared_every(64), compared_every(256)
    (1, 4)
    """
    return max(1, samples // _COMPARED_SAMPLES)


class ProfiledSamples:
    """Hidden states of one distribution at every block, for windows to calibrate on and windows to measure on."""

    def __init__(self, name: str, tokens: Tensor, stages: LayerwiseModel, work: ResumableRun) -> None:
        task = stages.task
        cut = parts(tokens, own=name == SELF)
        fitted, measured, others = (task.batches(part) if len(part) else () for part in cut)
        self._name, self._work, self.predictions = name, work, task.count(cut[1])
        self.batches = [*fitted, *measured, *others]
        self.hidden = HiddenStates(stages, work, name, self.batches)
        # numbers of the batches that errors are fitted on, and of those that they are measured on
        self.fitted = range(len(fitted))
        self.measured = range(len(fitted), len(fitted) + len(measured))

    @classmethod
    def of(cls, workspace: Workspace, name: str, tokens: Tensor) -> "ProfiledSamples":
        """Of a distribution, made once; when its hidden states are saved, only shape and dtype of its tokens matter."""
        return workspace.once(("flow", name), lambda: cls(name, tokens, workspace.stages, workspace.work))

    def draw_labels(self, stages: LayerwiseModel, generator: torch.Generator) -> None:
        """Save the gradients of the loss of the measured windows, for labels drawn from the model."""
        for number in self.measured:
            gradient = _label_gradient(stages, self.hidden.at(stages.depth, number), generator)
            self.put_gradient(stages.depth, number, gradient)

    def calibration(self, layer: int) -> Iterator[CalibrationBatch]:
        """The windows that errors are fitted on."""
        for number in self.fitted:
            yield CalibrationBatch(self.hidden.at(layer, number))

    def gradient(self, layer: int, number: int) -> Tensor:
        """Gradient of a batch at the input of a block."""
        return self._work.load(f"gradient-{layer}-{self._name}-{number}")["x"]

    def put_gradient(self, layer: int, number: int, gradient: Tensor) -> None:
        """Save a gradient."""
        self._work.save(f"gradient-{layer}-{self._name}-{number}", {"x": gradient})

    def forget(self, layer: int) -> None:
        """Remove what is not needed once a block's sensitivity is known."""
        self.hidden.forget(layer + 1)
        self._work.remove(f"gradient-{layer + 1}-{self._name}-*")


@torch.no_grad()
def go_forward(workspace: Workspace, given: BlockPass) -> None:
    """Run a block on a distribution and save its statistics; without a distribution, those of the weights alone."""
    view, layer, down = workspace.view, given.layer, _down(workspace.view, given.layer)
    if not given.name:
        weights = {"rounding": relative_errors(view, layer, given.how)}
        if given.how.others:
            weights["compared"] = compared_errors(view, layer, given.how.scheme, given.how.others)
        if down:
            weights["similarity"] = layer_similarity(view, layer)
        workspace.work.save(f"weights-{layer}", weights)
        return
    flow = given.samples(workspace)
    statistics = LayerStatistics(torch.stack([matrix.float().norm(dim=0) for matrix in down])) if down else None
    with in_stored_precision(view, layer), watching(view, layer, statistics):
        # the other batches have nothing but the significance of experts
        flow.hidden.advance(layer, numbers=None if view.has_experts else (*flow.fitted, *flow.measured))
    workspace.work.save(f"statistics-{layer}-{given.name}", statistics.sums if statistics else {})


def go_back(workspace: Workspace, given: BlockPass) -> None:
    """Save the sensitivity of a block's units, some experts at a time: their errors need most of a profile's memory."""
    view, layer, how = workspace.view, given.layer, given.how
    flow, units = given.samples(workspace), view.block_units(layer)
    experts = sorted({unit.expert for unit in units if unit.expert is not None})
    if given.experts is not None:
        experts = list(given.experts)
        units = [unit for unit in units if unit.expert is None or unit.expert in experts]
    slices = [experts[begin : begin + how.experts] for begin in range(0, len(experts), how.experts)] or [[]]
    inputs = None
    if how.method.needs_data:
        name = f"experts-{given.name}{workspace.mark}"
        inputs = BlockInputs(
            view, workspace.stages, layer, flow.calibration(layer), workspace.work, name,
            affinity=how.method.affinity,
        )  # fmt: skip
    sums: dict[str, Tensor] = {}
    for number, some in enumerate(slices):
        mine = [u for u in units if u.expert in some or (u.expert is None and number == 0)]
        seen = {} if inputs is None else {**inputs.linear, **(inputs.experts(some) if some else {})}
        sensitivity = Sensitivity(view, layer, mine, how, seen, folds=len(flow.measured))
        del seen
        _run_back(workspace, layer, flow, sensitivity, keep=number == len(slices) - 1)
        sums |= sensitivity.sums
    if inputs:
        inputs.drop()
    table = torch.stack([sums[unit.name] for unit in units], 1) / flow.predictions
    workspace.work.save(f"sensitivity-{layer}-{given.name}", {"sensitivity": table} | _sketched(view, layer, flow))


def _sketched(view: ModelView, layer: int, flow: ProfiledSamples) -> dict[str, Tensor]:
    """A sketch of the gradients at a block's output, per prediction, if its feed-forward units add to that."""
    sketch = None
    for number in flow.measured:
        gradient = flow.gradient(layer + 1, number)
        if not any(adds_to_output(unit, gradient.shape[-1]) for unit in view.block_units(layer)):
            return {}
        sketch = sketch or GradientSketch(gradient.shape[-1], seed=layer)
        sketch.add(gradient)
    if sketch is None:
        return {}
    found = sketch.result(flow.predictions)
    return {"gradient_rows": found.rows, "gradient_rest": found.rest}


def _down(view: ModelView, layer: int) -> list[Tensor]:
    """The `down_proj` matrices of the experts."""
    return [view.weight(u) for u in view.block_units(layer) if u.role == "expert" and u.projection == "down_proj"]


def _label_gradient(stages: LayerwiseModel, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of the negative log-likelihood of labels drawn from the model, at the last block's output."""
    hidden = hidden.detach().requires_grad_(True)
    logits = stages.task.predictions(stages.head(hidden)).float()
    labels = draw(logits.detach(), generator)
    return torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), hidden)[0]


def _run_back(workspace: Workspace, layer: int, flow: ProfiledSamples, sensitivity: Sensitivity, keep: bool) -> None:
    """Run a block again with gradients, which add to a sensitivity; `keep` saves those of the block's inputs."""
    view, stages = workspace.view, workspace.stages

    def linear(unit: Unit, x: Tensor, out: Tensor) -> None:
        module, samples = view.module(unit.module), None if stages.task.predicts_each else len(x)
        rows = input_rows(module, x.detach())
        if unit.name in sensitivity.sums:
            out.register_hook(lambda gradient: sensitivity.add(unit.name, rows, output_rows(module, gradient), samples))

    def put(index: int, gradient: Tensor) -> None:
        sensitivity.fold += 1
        if keep:
            flow.put_gradient(layer, flow.measured[index], gradient)

    with in_stored_precision(view, layer), watching(view, layer, sensitivity, linear):
        batches = ((flow.hidden.at(layer, number), flow.gradient(layer + 1, number)) for number in flow.measured)
        run_back(stages, layer, batches, put)
