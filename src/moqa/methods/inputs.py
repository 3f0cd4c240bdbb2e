"""What the units of a layer are multiplied with: weighted Gram matrices of their inputs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moqa.format.unfinished import Unfinished
from moqa.models.experts import Experts, ParameterWeights, weights_from, with_bias
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


def input_space(unit: Unit) -> str:
    """Name of what a unit is multiplied with; an expert's gate and up projection share theirs."""
    if unit.expert is not None:
        return f"{unit.module}.{unit.expert}.{'inner' if unit.projection == 'down_proj' else 'in'}"
    return unit.name


def by_input(units: Iterable[Unit]) -> dict[str, list[Unit]]:
    """Input space -> the units that share it, both in the order of the units.

    >>> [len(sharing) for sharing in by_input(view.layer_units(0)).values()][-2:]
    [2, 1]
    """
    found: dict[str, list[Unit]] = {}
    for unit in units:
        found.setdefault(input_space(unit), []).append(unit)
    return found


class LayerInputs:
    """What all units of a decoder layer are multiplied with; of its experts, some at a time.

    >>> inputs = LayerInputs(view, stages, 0, [Part(stages.embed(tokens))], work)
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
        self, view: ModelView, stages: Stages, layer: int, parts: Iterable[Part], work: Unfinished,
        name: str = "experts",
    ) -> None:  # fmt: skip
        self._open(view, layer, work, name)
        recorder = None if self._path is None else _Recorder(self._module, self._add)
        later = False

        def linear(unit: Unit, x: Tensor, _: Tensor) -> None:
            nonlocal later
            part, flat = self._parts[-1], x.flatten(0, -2)
            found = self.linear.setdefault(input_space(unit), Inputs.zeros(flat.shape[1]))
            found.add(flat, part.share, part.check)
            later |= recorder is not None and recorder.called

        with torch.no_grad(), watching(view, layer, None, linear), weights_from(self._module, recorder):
            for part in parts:
                # not a view, which would keep what it is a view of
                self._parts.append(replace(part, hidden=part.hidden.new_empty(0)))
                stages.layer(layer, part.hidden)
                if recorder is not None:
                    # nothing but the output of the layer, which nobody wants here, may depend on its experts
                    recorder.exact, recorder.called = later, False

    @classmethod
    def recorded(
        cls, view: ModelView, layer: int, parts: Sequence[Part], work: Unfinished, name: str = "experts"
    ) -> "LayerInputs":
        """Those of experts whose calls lie in `work` already, put aside by any process; none of other units.

        >>> LayerInputs.recorded(view, 0, inputs.parts, work).experts([7]).keys() == inputs.experts([7]).keys()
        True
        """
        found = cls.__new__(cls)
        found._open(view, layer, work, name)
        found._parts += parts
        return found

    @property
    def parts(self) -> tuple[Part, ...]:
        """The samples' shares and roles, without their hidden states."""
        return tuple(self._parts)

    def _open(self, view: ModelView, layer: int, work: Unfinished, name: str) -> None:
        self._path = view.experts_path(layer)
        self._module: Experts = None if self._path is None else view.module(self._path)
        self._work, self._name, self._parts = work, name, list[Part]()
        self.linear: dict[str, Inputs] = {}
        view.need(layer)

    def _add(self, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        self._work.keep(f"{self._name}-{len(self._parts) - 1}", {"x": hidden, "index": index, "gate": weights})

    @torch.no_grad()
    def experts(self, which: Sequence[int]) -> dict[str, Inputs]:
        """Inputs of some experts, by input space; those that no token reached have none.

        Each input is counted by the gate weight that its output gets.
        """
        found: dict[str, Inputs] = {}
        weights = ParameterWeights(self._module)
        for number, part in enumerate(self._parts):
            call = self._work.kept(f"{self._name}-{number}")
            for expert in which:
                tokens, places = (call["index"] == expert).nonzero(as_tuple=True)
                if not len(tokens):
                    continue
                x, gate = call["x"][tokens], call["gate"][tokens, places, None]
                gate_up = with_bias(self._module, "gate_up_proj", expert, weights.gate_up(expert, x))
                inner = self._module._apply_gate(gate_up)
                for space, seen in (("in", x), ("inner", inner)):
                    name = f"{self._path}.{expert}.{space}"
                    found.setdefault(name, Inputs.zeros(seen.shape[1])).add(seen * gate, part.share, part.check)
        return found

    def drop(self) -> None:
        """Remove what was put aside."""
        self._work.drop(f"{self._name}-*")


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
