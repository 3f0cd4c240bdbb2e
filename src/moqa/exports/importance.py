"""Importance of the inputs of every unit: what encoders of other engines weigh rounding errors with."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moqa.calibration.inputs import BlockInputs, InputStatistics, input_space
from moqa.models.view import ModelView
from moqa.profiling import Profile
from moqa.quantization.samples import CalibrationSamples, held_out
from moqa.storage.resumable import ResumableRun

# experts whose inputs are looked up together
_TOGETHER = 16


@dataclass(frozen=True)
class Importance:
    """Of the inputs of one unit.

    Attributes:
        squares: [in] sum over samples of squared inputs; those of experts times the squared weight of their output.
        tokens: that reached the unit.
    """

    squares: Tensor
    tokens: int


class ImportanceSamples:
    """The samples of a profile as they pass through the original, layer by layer.

    Args:
        view: the original.
        mixture: share of each distribution.
        profile: holds the samples.
        work: stores the hidden states.
    """

    def __init__(self, view: ModelView, mixture: Mapping[str, float], profile: Profile, work: ResumableRun) -> None:
        self._view, self._samples = view, CalibrationSamples(view, mixture, profile, work)
        # the shares of all fitted tokens sum to 1
        fitted = [samples[~held_out(len(samples))] for samples in map(profile.samples, mixture)]
        self._tokens = sum(view.task.count(samples) for samples in fitted)

    @torch.no_grad()
    def of_layer(self, layer: int) -> dict[str, Importance]:
        """Unit name -> importance of units that tokens reached, and the samples moved past the layer."""
        inputs = self._samples.inputs(layer, with_slopes=False)
        units = self._view.block_units(layer)
        found = self._of_spaces(inputs, sorted({unit.expert for unit in units if unit.expert is not None}))
        inputs.drop()
        self._samples.advance_original(layer)
        return {
            unit.name: Importance(seen.squares * self._tokens, seen.tokens)
            for unit in units
            if (seen := found.get(input_space(unit))) is not None
        }

    def forget(self, layer: int) -> None:
        """Remove the stored inputs of a layer that is done."""
        self._samples.forget(layer)

    def _of_spaces(self, inputs: BlockInputs, experts: list[int]) -> dict[str, Importance]:
        found = {space: _of(statistics) for space, statistics in inputs.linear.items()}
        for first in range(0, len(experts), _TOGETHER):
            some = inputs.experts(experts[first : first + _TOGETHER])
            found |= {space: _of(statistics) for space, statistics in some.items()}
        return found


def _of(statistics: InputStatistics) -> Importance:
    return Importance(statistics.energy.clone(), statistics.tokens)


def weights_of(importance: Mapping[str, Importance], names: list[str], features: int) -> dict[str, Tensor]:
    """[in] mean squared inputs of some units that share a shape; those that no token reached have that of the others.

    >>> seen = {"a": Importance(torch.tensor([1.0, 3.0]), 4)}
    >>> weights_of(seen, ["a", "b"], 2)["b"]
    tensor([0.2500, 0.7500])

    Args:
        importance: of units that tokens reached.
        names: of the units.
        features: inputs of each.
    """
    there = {name: seen.squares / seen.tokens for name in names if (seen := importance.get(name)) and seen.tokens}
    mean = torch.stack(list(there.values())).mean(0) if there else torch.ones(features)
    return {name: there.get(name, mean) for name in names}
