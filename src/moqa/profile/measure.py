"""Statistics of some distributions: a pass forward for significance, a pass back for sensitivity, layer by layer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moqa.format.scheme import Scheme
from moqa.format.unfinished import Unfinished
from moqa.methods import Method
from moqa.methods.hidden import HiddenStates
from moqa.methods.inputs import LayerInputs, Part
from moqa.models.experts import projection_rows
from moqa.models.narrow import in_stored_precision
from moqa.models.stages import Stages, batches
from moqa.models.units import Unit
from moqa.models.view import ModelView
from moqa.models.watch import watching
from moqa.profile.selfsample import draw
from moqa.profile.sensitivity import PROBES, LayerErrors, LayerObserver, Sensitivity, all_widths, relative_errors
from moqa.profile.significance import LayerStatistics, layer_similarity
from moqa.progress import Report


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        statistics: distribution -> name (`layer.3.channel`, ..., `sensitivity` [units, widths]) -> tensor.
        weights: `rounding` [units, widths], the relative squared rounding error, and `layer.3.similarity`.
    """

    statistics: dict[str, dict[str, Tensor]]
    weights: dict[str, Tensor]


class Measurement:
    """A measurement of a model on some distributions; what is done of it survives a kill.

    >>> measured = Measurement(view, {"wiki": tokens}, Scheme(width=4), (2, 3, 4), gptq, 0, work, 16).run(report)

    Hidden states of all layers lie on disk: significance is measured on the way forward, sensitivity on the way back.

    Args:
        view: the original model.
        samples: distribution name -> [windows, context] token ids.
        scheme: group size, symmetry and scale dtype of the quantization whose errors are measured.
        widths: candidate widths, ascending.
        method: the quantization method whose errors are measured.
        seed: of the labels that are drawn from the model's own predictions.
        work: where everything is put aside.
        experts: how many are worked on together.
        sensitivity: whether the way back is gone.
    """

    def __init__(
        self,
        view: ModelView,
        samples: Mapping[str, Tensor],
        scheme: Scheme,
        widths: Sequence[int],
        method: Method,
        seed: int,
        work: Unfinished,
        experts: int,
        sensitivity: bool = True,
    ) -> None:
        self._view, self._stages, self._work = view, Stages(view.model), work
        self._scheme, self._widths, self._method, self._seed = scheme, tuple(widths), method, seed
        self._probes = tuple(width for width in PROBES if width in widths)
        self._experts, self._sensitivity = experts, sensitivity
        self._flows = {name: _Flow(name, tokens, self._stages, work) for name, tokens in samples.items()}

    def run(self, report: Report) -> Measured:
        """Measure what is not measured yet."""
        depth, work = self._stages.depth, self._work
        for layer in range(depth):
            if work.noted(f"forward-{layer}") is None:
                report("activation", layer, depth, layer=layer)
                self._forward(layer)
                work.note(f"forward-{layer}", {})
        report("activation", depth, depth)
        if self._sensitivity:
            self._go_back(report)
        return self._gathered()

    def _go_back(self, report: Report) -> None:
        depth, work = self._stages.depth, self._work
        if work.noted("labels") is None:
            generator = torch.Generator().manual_seed(self._seed)
            for flow in self._flows.values():
                flow.draw_labels(self._stages, generator)
            work.note("labels", {})
        for layer in reversed(range(depth)):
            if work.noted(f"backward-{layer}") is None:
                report("sensitivity", depth - 1 - layer, depth, layer=layer)
                self._backward(layer)
                work.note(f"backward-{layer}", {})
                for flow in self._flows.values():
                    flow.forget(layer)
        report("sensitivity", depth, depth)

    @torch.no_grad()
    def _forward(self, layer: int) -> None:
        view, units = self._view, self._view.layer_units(layer)
        down = [view.weight(u) for u in units if u.role == "expert" and u.projection == "down_proj"]
        norms = torch.stack([matrix.float().norm(dim=0) for matrix in down]) if down else None
        for name, flow in self._flows.items():
            statistics = LayerStatistics(norms) if norms is not None else None
            with in_stored_precision(view, layer), watching(view, layer, statistics):
                flow.hidden.advance(layer)
            self._work.keep(f"statistics-{layer}-{name}", statistics.tensors() if statistics else {})
        weights = {"rounding": relative_errors(view, units, self._scheme, self._widths)}
        if down:
            weights["similarity"] = layer_similarity(view, layer)
        self._work.keep(f"weights-{layer}", weights)

    def _backward(self, layer: int) -> None:
        """Sensitivity of a layer's units, some experts at a time: their errors are a profile's largest memory."""
        view, units = self._view, self._view.layer_units(layer)
        experts = sorted({unit.expert for unit in units if unit.expert is not None})
        slices = [experts[begin : begin + self._experts] for begin in range(0, len(experts), self._experts)] or [[]]
        for name, flow in self._flows.items():
            inputs = None
            if self._method.needs_data:
                inputs = LayerInputs(view, self._stages, layer, flow.calibration(layer), self._work)
            sums: dict[str, Tensor] = {}
            for number, some in enumerate(slices):
                mine = [u for u in units if u.expert in some or (u.expert is None and number == 0)]
                seen = {} if inputs is None else {**inputs.linear, **(inputs.experts(some) if some else {})}
                errors = LayerErrors(view, mine, self._scheme, self._method, seen, self._probes)
                del seen
                sums |= _run_back(view, self._stages, layer, flow, errors, keep=number == len(slices) - 1)
            if inputs:
                inputs.drop()
            sensitivity = torch.stack([sums[unit.name] for unit in units]) / flow.tokens
            self._work.keep(f"sensitivity-{layer}-{name}", {"sensitivity": sensitivity})

    def _gathered(self) -> Measured:
        depth, kept = self._stages.depth, self._work.kept
        weights = {layer: kept(f"weights-{layer}") for layer in range(depth)}
        relative = torch.cat([weights[layer]["rounding"] for layer in range(depth)])
        found: dict[str, dict[str, Tensor]] = {}
        for name in self._flows:
            found[name] = {
                f"layer.{layer}.{key}": value
                for layer in range(depth)
                for key, value in kept(f"statistics-{layer}-{name}").items()
            }
            if self._sensitivity:
                probed = torch.cat([kept(f"sensitivity-{layer}-{name}")["sensitivity"] for layer in range(depth)])
                found[name]["sensitivity"] = all_widths(probed, relative, self._probes, self._widths)
        similar = {f"layer.{n}.similarity": w["similarity"] for n, w in weights.items() if "similarity" in w}
        return Measured(found, {"rounding": relative, **similar})


class _Flow:
    """One distribution on its way: hidden states at every layer, for windows to calibrate on and windows to measure."""

    def __init__(self, name: str, tokens: Tensor, stages: Stages, work: Unfinished) -> None:
        # A method that fits samples leaves less error there than elsewhere: errors are made on every other window and
        # measured on the rest.
        first, second = (tokens[0::2], tokens[1::2]) if len(tokens) > 1 else (tokens, tokens)
        self._name, self._work, self.tokens = name, work, second.numel()
        every = [*batches(first), *batches(second)]
        self._calibrate = len(batches(first))
        self.hidden = HiddenStates(stages, work, name, every)
        # numbers of the batches that are measured on
        self.measured = range(self._calibrate, len(every))

    def draw_labels(self, stages: Stages, generator: torch.Generator) -> None:
        """Gradients of the measured windows' log-likelihood, of labels drawn from the model."""
        for number in self.measured:
            gradient = _label_gradient(stages, self.hidden.at(stages.depth, number), generator)
            self.put_gradient(stages.depth, number, gradient)

    def calibration(self, layer: int) -> Iterator[Part]:
        """The windows that errors are made on."""
        for number in range(self._calibrate):
            yield Part(self.hidden.at(layer, number))

    def gradient(self, layer: int, number: int) -> Tensor:
        """Gradient of a batch at the input of a layer."""
        return self._work.kept(f"gradient-{layer}-{self._name}-{number}")["x"]

    def put_gradient(self, layer: int, number: int, gradient: Tensor) -> None:
        """Put a gradient aside."""
        self._work.keep(f"gradient-{layer}-{self._name}-{number}", {"x": gradient})

    def forget(self, layer: int) -> None:
        """Remove what nobody needs once a layer's sensitivity is known."""
        self.hidden.forget(layer + 1)
        self._work.drop(f"gradient-{layer + 1}-{self._name}-*")


def _label_gradient(stages: Stages, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of the negative log-likelihood of labels drawn from the model, for the last layer's output."""
    hidden = hidden.detach().requires_grad_(True)
    logits = stages.head(hidden).float().flatten(0, 1)
    labels = draw(logits.detach(), generator)
    return torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), hidden)[0]


def _run_back(
    view: ModelView, stages: Stages, layer: int, flow: _Flow, errors: LayerErrors, keep: bool
) -> dict[str, Tensor]:
    """Run a layer again with gradients; `keep` puts those of the layer's inputs aside."""
    sensitivity = Sensitivity(errors)
    path = view.experts_path(layer)
    observer = LayerObserver(sensitivity, path, projection_rows(view.module(path))) if path else None

    def linear(unit: Unit, x: Tensor, out: Tensor) -> None:
        flat = x.detach().flatten(0, -2)
        if unit.name in sensitivity.sums:
            out.register_hook(lambda gradient: sensitivity.add(unit.name, flat, gradient.flatten(0, -2)))

    with in_stored_precision(view, layer), watching(view, layer, observer, linear):
        for number in flow.measured:
            hidden = flow.hidden.at(layer, number).requires_grad_(True)
            gradient = flow.gradient(layer + 1, number)
            gradient = torch.autograd.grad(stages.layer(layer, hidden), hidden, gradient)[0]
            if keep:
                flow.put_gradient(layer, number, gradient)
    return sensitivity.sums
