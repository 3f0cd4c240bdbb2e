"""Sensitivity: how much the model's output suffers when one unit loses precision."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moqa.format.grid import fit_grid
from moqa.format.scheme import Scheme
from moqa.models.experts import ExpertRun
from moqa.models.units import Unit
from moqa.models.view import ModelView

# eight errors per weight are a profile's largest memory and products; in bfloat16 a sensitivity changes by below 1 %
_DTYPE = torch.bfloat16


class Rounding:
    """Rounding errors of a layer's units at every candidate width.

    >>> rounding = Rounding(view, view.layer_units(0), Scheme(width=4), (2, 3, 4))
    >>> rounding.errors["model.layers.0.self_attn.q_proj"].shape
    torch.Size([3, 256, 256])

    Attributes:
        errors: unit name -> [widths, out, in] stored minus original weights, bfloat16.
        relative: unit name -> [widths] squared error over squared weights.
    """

    def __init__(self, view: ModelView, units: Sequence[Unit], scheme: Scheme, widths: Sequence[int]) -> None:
        self.errors: dict[str, Tensor] = {}
        self.relative: dict[str, Tensor] = {}
        for unit in units:
            weight = view.weight(unit).float()
            stacked = weight.expand(len(widths), -1, -1)
            grid = fit_grid(stacked, scheme, torch.tensor(widths))
            error = grid.decode(grid.encode(stacked)) - stacked
            self.errors[unit.name] = error.to(_DTYPE)
            self.relative[unit.name] = error.square().sum((1, 2)) / weight.square().sum().clamp_min(1e-30)


class Sensitivity:
    """Expected rise of the KL divergence for each unit and width: a sum over tokens.

    For a unit with input x_t, output gradient g_t and rounding error E it is half the sum of (g_t . E x_t)^2: the
    second-order term of the KL divergence between the original's and the quantized model's predictions, if g comes
    from labels drawn from the model's own prediction (the true Fisher matrix) and tokens are taken as independent.
    Our design; weight by weight (squared gradient x squared error) it predicts less well (docs/results/ablations.md).
    """

    def __init__(self, rounding: Rounding) -> None:
        self._rounding = rounding
        self.sums: dict[str, Tensor] = {name: torch.zeros(len(e)) for name, e in rounding.errors.items()}

    def add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Add [tokens, in] inputs and [tokens, out] gradients of the log-likelihood of drawn labels."""
        error = self._rounding.errors[name]
        widths, out, features = error.shape
        shift = (x.to(_DTYPE) @ error.reshape(widths * out, features).T).unflatten(-1, (widths, out))
        self.sums[name] += 0.5 * torch.einsum("two,to->tw", shift, gradient.to(_DTYPE)).float().square().sum(0)


class LayerObserver:
    """Feeds a layer's experts into `Sensitivity` while gradients flow back through them."""

    def __init__(self, sensitivity: Sensitivity, path: str, rows: dict[str, slice]) -> None:
        self._sensitivity, self._path, self._rows = sensitivity, path, rows

    def routed(self, index: Tensor, weights: Tensor) -> None:
        """Routing does not matter here."""

    def expert(self, run: ExpertRun) -> None:
        """Wait for the gradients of one expert's two products."""
        name, x, inner = f"{self._path}.{run.expert}", run.x.detach(), run.inner.detach()

        def back_gate_up(gradient: Tensor) -> None:
            for projection, rows in self._rows.items():
                self._sensitivity.add(f"{name}.{projection}", x, gradient[:, rows])

        run.gate_up.register_hook(back_gate_up)
        run.out.register_hook(lambda gradient: self._sensitivity.add(f"{name}.down_proj", inner, gradient))
