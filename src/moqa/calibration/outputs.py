"""Gradients at the outputs of units: how much errors of several outputs matter together."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moqa.calibration.inputs import InputStatistics
from moqa.models.slopes import COMBINED
from moqa.models.units import Unit
from moqa.models.view import ModelView

# directions in which gradients are summed up
SKETCHED = 256
_SHIFT = 1e-3


def adds_to_output(unit: Unit, features: int) -> bool:
    """Whether a unit's outputs are added to those of its block, which have some features."""
    return unit.projection == "down_proj" and unit.role != "attention" and unit.shape[0] == features


@dataclass(frozen=True)
class Gradients:
    """A Gram matrix of gradients, as that of a few rows and a diagonal.

    Attributes:
        rows: [rows, features].
        rest: [features] what the rows' Gram matrix lacks on the diagonal.
    """

    rows: Tensor
    rest: Tensor

    def gram(self, weight: Tensor | None = None) -> Tensor:
        """[features, features] float32; with a weight [features, in], [in, in] of the gradients at its inputs."""
        rows, rest = self.rows.float(), self.rest.float()
        if weight is None:
            return (rows.T @ rows).add_(rest.diag())
        before = rows @ weight
        return (before.T @ before).addmm_(weight.T * rest, weight)

    @classmethod
    def mixed(cls, parts: Iterable[tuple["Gradients", float]]) -> "Gradients":
        """Of several distributions with their shares."""
        each = [(part.rows.float() * share**0.5, part.rest.float() * share) for part, share in parts]
        rows, rest = zip(*each, strict=True)
        return cls(torch.cat(rows), torch.stack(rest).sum(0))


class GradientSketch:
    """Sums up gradients at the output of a block, in little memory.

    >>> sketch = GradientSketch(2048, seed=0)
    >>> sketch.add(torch.randn(16, 2048))
    >>> sketch.result(16).rows.shape
    torch.Size([256, 2048])

    Nystroem's approximation of the Gram matrix (arXiv 1706.05736, algorithm 3), plus the rest of its diagonal.

    Args:
        features: of a gradient.
        seed: of random directions.
    """

    def __init__(self, features: int, seed: int) -> None:
        generator, shape = torch.Generator().manual_seed(seed), (features, min(features, SKETCHED))
        self._directions = torch.linalg.qr(torch.randn(shape, generator=generator))[0]
        self._products, self._energy = torch.zeros(shape), torch.zeros(features)

    def add(self, gradients: Tensor) -> None:
        """Add [..., features] gradients."""
        gradients = gradients.flatten(0, -2).float()
        self._products.addmm_(gradients.T, gradients @ self._directions)
        self._energy += gradients.square().sum(0)

    def result(self, count: int) -> Gradients:
        """The sums, divided by a number of predictions."""
        energy, directions = self._energy.double(), self._directions.double()
        if not energy.any():
            return Gradients(torch.zeros(self._products.T.shape).bfloat16(), energy.bfloat16())
        # a little of the identity, without which the smallest eigenvalues would be lost in rounding
        products = self._products.double() + directions * (_SHIFT * energy.mean())
        corner = directions.T @ products
        factor = torch.linalg.cholesky((corner + corner.T) / 2)
        rows = torch.linalg.solve_triangular(factor, products.T, upper=False) * count**-0.5
        rest = (energy / count - rows.square().sum(0)).clamp_min(0)
        # gradients may be tiny: bfloat16 has their range
        return Gradients(rows.bfloat16(), rest.bfloat16())


class OutputGradients:
    """Gram matrices of the gradients at the outputs of a block's feed-forward units, up to a factor.

    >>> gradients = OutputGradients(view, 0, Gradients(torch.randn(64, 256), torch.zeros(256)))
    >>> gradients.gram(view.units["model.layers.0.mlp.experts.7.down_proj"], InputStatistics(256)).shape
    torch.Size([256, 256])

    Outputs of a `down_proj` are added to the block's: their gradients are the block's, for every expert. Gradients at
    the outputs of gate and up are those of the `down_proj`'s inputs times slopes of the activation; as if both were
    independent, their Gram matrix is the product of two, element by element.

    The second factor of a Hessian with two (K-FAC, arXiv 1503.05671, section 3; YAQA, arXiv 2505.22988), from one
    matrix per block: few tokens reach an expert, and that of its own gradients does less well (docs/decisions.md).

    Args:
        view: the model; the block has its original weights.
        layer: index of the block.
        gradients: at the block's output.
    """

    def __init__(self, view: ModelView, layer: int, gradients: Gradients) -> None:
        self._view, self._gradients = view, gradients
        self._units = {unit.name: unit for unit in view.block_units(layer)}

    def gram(self, unit: Unit, inputs: InputStatistics) -> Tensor | None:
        """[out, out] float32; None for a unit of another kind, or one that no token reached.

        Args:
            unit: of the block.
            inputs: of the unit, with slopes of the activation.
        """
        down = self._units.get(unit.name.removesuffix(unit.projection) + "down_proj")
        if down is None or not adds_to_output(down, len(self._gradients.rest)):
            return None
        if unit is down:
            return self._gradients.gram()
        if inputs.slopes is None or unit.projection not in COMBINED:
            return None
        before = self._gradients.gram(self._view.weight(down).float())
        return before.mul_(inputs.slopes[COMBINED.index(unit.projection)])
