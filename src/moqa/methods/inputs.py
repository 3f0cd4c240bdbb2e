"""What the units of a layer are multiplied with: weighted Gram matrices of their inputs."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moqa.models.experts import ExpertRun
from moqa.models.stages import Stages
from moqa.models.units import Unit
from moqa.models.view import ModelView
from moqa.models.watch import watching


@dataclass
class Inputs:
    """What the units of one input space were multiplied with.

    Attributes:
        fit: [in, in] sum of x x^T over samples that may be fitted on, float32.
        check: [in, in] the same over other samples, by which results are compared.
        tokens: how many inputs `fit` saw.
    """

    fit: Tensor
    check: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, features: int) -> "Inputs":
        """No input seen yet."""
        return cls(torch.zeros(features, features), torch.zeros(features, features))

    def add(self, x: Tensor, share: float, check: bool) -> None:
        """Add [tokens, in] inputs whose squares count `share` each."""
        gram = x.T @ x
        if check:
            self.check.add_(gram, alpha=share)
        else:
            self.fit.add_(gram, alpha=share)
            self.tokens += len(x)


@dataclass(frozen=True)
class Part:
    """Some samples on their way through the model.

    Attributes:
        hidden: [batch, context, features] input of the next layer.
        share: how much each token counts.
        check: whether the samples are kept from fitting.
    """

    hidden: Tensor
    share: float = 1.0
    check: bool = False


class _Observer:
    """Collects the inputs of a layer's experts, each counted by the gate weight that its output gets."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.inputs: dict[str, Inputs] = {}
        self.part: Part | None = None

    def add(self, name: str, x: Tensor) -> None:
        assert self.part is not None
        self.inputs.setdefault(name, Inputs.zeros(x.shape[1])).add(x, self.part.share, self.part.check)

    def routed(self, index: Tensor, weights: Tensor) -> None:
        """Routing shows in the inputs."""

    def expert(self, run: ExpertRun) -> None:
        self.add(f"{self._path}.{run.expert}.in", run.x * run.gate)
        self.add(f"{self._path}.{run.expert}.inner", run.inner * run.gate)


def input_space(unit: Unit) -> str:
    """Name of what a unit is multiplied with; an expert's gate and up projection share theirs."""
    if unit.expert is not None:
        return f"{unit.module}.{unit.expert}.{'inner' if unit.projection == 'down_proj' else 'in'}"
    return unit.name


@torch.no_grad()
def gather_inputs(view: ModelView, stages: Stages, layer: int, parts: Iterable[Part]) -> dict[str, Inputs]:
    """Inputs of all units of a layer, by input space; spaces that no token reached are absent.

    >>> gather_inputs(view, stages, 0, [Part(stages.embed(tokens))])["model.layers.0.self_attn.q_proj"].tokens
    2048

    Args:
        view: the model.
        stages: of the same model.
        layer: index of the decoder layer, with the weights that inputs are wanted for.
        parts: samples, at the layer's input.
    """
    observer = _Observer(view.experts_path(layer) or "")

    def linear(unit: Unit, x: Tensor, _: Tensor) -> None:
        observer.add(input_space(unit), x.flatten(0, -2))

    with watching(view, layer, observer, linear):
        for observer.part in parts:
            stages.layer(layer, observer.part.hidden)
    return observer.inputs
