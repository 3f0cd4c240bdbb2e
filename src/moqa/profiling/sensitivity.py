"""Sensitivity: how much the model's output suffers when one unit loses precision."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moqa.calibration.inputs import InputStatistics
from moqa.calibration.stacks import stacks
from moqa.format.scheme import Scheme
from moqa.methods import Method, SolveBatch
from moqa.methods.grid import fit_grid
from moqa.models.experts import ExpertRun
from moqa.models.units import Unit
from moqa.models.view import ModelView

# the errors need most of a profile's memory and time; bfloat16 changes a sensitivity by less than 1 %
_DTYPE = torch.bfloat16
# weights of a unit from which its relative rounding errors are computed: enough for an accuracy of a percent
_SAMPLED_WEIGHTS = 2**17

# Widths whose errors are really made and measured. The sensitivity at other widths is extrapolated from the nearest of
# them by the ratio of the weights' rounding errors.
PROBES = (1, 2, 3, 4)


class LayerErrors:
    """Errors that a method makes in a block's units at the probed widths, calibrated on one distribution.

    >>> from moqa.methods import METHODS
    >>> errors = LayerErrors(view, view.block_units(0), Scheme(width=4), METHODS["rtn"], {}, (2, 3, 4))
    >>> errors["model.layers.0.self_attn.q_proj"].shape
    torch.Size([3, 256, 256])
    """

    def __init__(
        self,
        view: ModelView,
        units: Sequence[Unit],
        scheme: Scheme,
        method: Method,
        inputs: Mapping[str, InputStatistics],
        probes: Sequence[int],
    ) -> None:
        self.probes = tuple(probes)
        self._errors: dict[str, Tensor] = {}
        schemes = dict.fromkeys((unit.name for unit in units), scheme)
        for stack in stacks(view, units, schemes, inputs, copies=len(probes)):
            rows = stack.weights.shape[1]
            weights = stack.weights.repeat(1, len(probes), 1)
            widths = torch.tensor(self.probes).repeat_interleave(rows).expand(len(weights), -1)
            stored = method.run(SolveBatch(weights, widths, stack.inputs if method.needs_data else [], scheme)).decode()
            error = (stored - weights).to(_DTYPE).unflatten(1, (len(probes), rows))
            for unit, entry, place in stack.places():
                self._errors[unit.name] = error[entry, :, place]

    def __getitem__(self, name: str) -> Tensor:
        """[probes, out, in] stored minus original weights of a unit, bfloat16."""
        return self._errors[name]

    def names(self) -> list[str]:
        """Names of the units, in the block's order."""
        return list(self._errors)


def relative_errors(view: ModelView, units: Sequence[Unit], scheme: Scheme, widths: Sequence[int]) -> Tensor:
    """[units, widths] squared error of rounding over squared weights, float32; large units are sampled by rows."""
    rows = []
    for unit in units:
        weight = view.weight(unit)
        weight = weight[:: max(1, weight.numel() // _SAMPLED_WEIGHTS)].float()
        stacked = weight.expand(len(widths), -1, -1)
        error = fit_grid(stacked, scheme, torch.tensor(widths)).error
        rows.append(error.sum((1, 2)) / weight.square().sum().clamp_min(1e-30))
    return torch.stack(rows)


def all_widths(probed: Tensor, relative: Tensor, probes: Sequence[int], widths: Sequence[int]) -> Tensor:
    """Sensitivities at all widths from the measured ones.

    >>> all_widths(torch.tensor([[4.0, 1.0]]), torch.tensor([[1.0, 0.2, 0.05]]), (2, 3), (2, 3, 4))
    tensor([[4.0000, 1.0000, 0.2500]])

    Args:
        probed: [units, probes] measured sensitivities.
        relative: [units, widths] rounding errors of the weights.
        probes: widths that were measured.
        widths: ascending; includes all probes.

    Returns:
        [units, widths], never rising with the width.
    """
    columns = [min(range(len(probes)), key=lambda i: abs(probes[i] - width)) for width in widths]
    anchors = relative[:, [widths.index(probes[i]) for i in columns]]
    found = probed[:, columns] * relative / anchors.clamp_min(1e-30)
    return found.cummin(1).values


class Sensitivity:
    """Expected rise of the KL divergence for each unit and width: a sum over tokens.

    For a unit with input x_t, output gradient g_t and rounding error E it is half the sum of (g_t . E x_t)^2. That is
    the second-order term of the KL divergence between the predictions of the original and of the quantized model, if g
    comes from labels drawn from the model's own predictions (the true Fisher matrix) and tokens are independent.
    Our design; the sum over single weights (squared gradient x squared error) predicts less well, see
    docs/results/ablations.md.
    """

    def __init__(self, errors: LayerErrors) -> None:
        self._errors = errors
        self.sums: dict[str, Tensor] = {name: torch.zeros(len(errors.probes)) for name in errors.names()}

    def add(self, name: str, x: Tensor, gradient: Tensor, samples: int | None = None) -> None:
        """Add [tokens, in] inputs and [tokens, out] gradients of the log-likelihood of drawn labels.

        Args:
            name: of the unit.
            x: inputs.
            gradient: of its outputs.
            samples: number of samples, if all rows of a sample share one label: their effects on it are added before
                they are squared.
        """
        error = self._errors[name]
        widths, out, features = error.shape
        shift = (x.to(_DTYPE) @ error.reshape(widths * out, features).T).unflatten(-1, (widths, out))
        effect = torch.einsum("two,to->tw", shift, gradient.to(_DTYPE)).float()
        if samples is not None:
            effect = effect.unflatten(0, (samples, -1)).sum(1)
        self.sums[name] += 0.5 * effect.square().sum(0)


class LayerObserver:
    """Passes inputs and gradients of a block's experts to `Sensitivity` during the backward pass."""

    def __init__(self, sensitivity: Sensitivity, path: str, rows: dict[str, slice]) -> None:
        self._sensitivity, self._path, self._rows = sensitivity, path, rows

    def routed(self, index: Tensor, weights: Tensor) -> None:
        """Does nothing: routing does not matter here."""

    def expert(self, run: ExpertRun) -> None:
        """Register hooks for the gradients of one expert's two products."""
        name, x, inner = f"{self._path}.{run.expert}", run.x.detach(), run.inner.detach()

        if f"{name}.down_proj" not in self._sensitivity.sums:
            return

        def back_gate_up(gradient: Tensor) -> None:
            for projection, rows in self._rows.items():
                self._sensitivity.add(f"{name}.{projection}", x, gradient[:, rows])

        run.gate_up.register_hook(back_gate_up)
        run.out.register_hook(lambda gradient: self._sensitivity.add(f"{name}.down_proj", inner, gradient))
