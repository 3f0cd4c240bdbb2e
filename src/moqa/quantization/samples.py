"""The hidden states of the samples as they pass through the model, whose earlier blocks are already quantized."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moqa.calibration.hidden import HiddenStates
from moqa.calibration.inputs import HELD_OUT_EVERY, BlockInputs, CalibrationBatch
from moqa.calibration.outputs import Gradients
from moqa.format.scheme import Scheme
from moqa.models.view import ModelView
from moqa.models.whole import stages_of
from moqa.planning import Plan
from moqa.profiling import Profile
from moqa.quantization.layer import QuantizedUnit, quantized
from moqa.storage.resumable import ResumableRun


class CalibrationSamples:
    """Samples as inputs of the current layer; they are on disk, and are loaded in batches.

    Args:
        view: the model.
        mixture: share of each distribution.
        profile: holds the samples.
        work: stores the hidden states.
        name: that distinguishes them from others in `work`.
    """

    def __init__(
        self, view: ModelView, mixture: Mapping[str, float], profile: Profile, work: ResumableRun, name: str = ""
    ) -> None:  # fmt: skip
        self._view, self._work, self._stages = view, work, stages_of(view.model)
        self._mixture, self._profile = mixture, profile
        self._parts: list[tuple[float, bool]] = []  # of each batch: share, whether it is held out
        batches: list[Tensor] = []
        # sorted, so that a plan read from a file has the same order: sums of floats depend on it
        for text, share in sorted(mixture.items()):
            tokens = profile.samples(text)
            check = held_out(len(tokens))
            for held, windows in ((False, tokens[~check]), (True, tokens[check])):
                for batch in self._stages.task.batches(windows) if len(windows) else ():
                    # every distribution is weighted by its share, whatever its number of samples
                    self._parts.append((share / self._stages.task.count(windows), held))
                    batches.append(batch)
        self._hidden = HiddenStates(self._stages, work, f"{name}samples", batches)

    def inputs(self, layer: int, with_slopes: bool = True) -> BlockInputs:
        """Inputs of all units of a layer, whose weights are still the original ones.

        Args:
            layer: index of the layer.
            with_slopes: whether slopes of activations are needed, too, if gradients are known.
        """
        states = (self._hidden.at(layer, number) for number in range(len(self._parts)))
        batches = (CalibrationBatch(x, share, held) for x, (share, held) in zip(states, self._parts, strict=True))
        with_slopes = with_slopes and self.gradients(layer) is not None
        return BlockInputs(self._view, self._stages, layer, batches, self._work, with_slopes=with_slopes)

    def gradients(self, layer: int) -> Gradients | None:
        """Gradients at the output of a layer, if they were measured."""
        return self._profile.gradients(layer, self._mixture)

    def advance(self, layer: int, done: Mapping[str, QuantizedUnit], schemes: Mapping[str, Scheme]) -> None:
        """Move the hidden states past a layer that has been quantized."""
        with quantized(self._view, layer, done, schemes):
            self._hidden.advance(layer)

    def advance_original(self, layer: int) -> None:
        """Move the hidden states past a layer as it is."""
        self._hidden.advance(layer)

    def forget(self, layer: int) -> None:
        """Remove the stored inputs of a layer that is done."""
        self._hidden.forget(layer)


def tokens_of(plan: Plan, profile: Profile) -> int:
    """Number of sample tokens of a plan's distributions.

    >>> tokens_of(plan, profile)
    160
    """
    return sum(profile.record.distributions[name].tokens for name in plan.mixture)


def held_out(windows: int) -> Tensor:
    """[windows] which windows are held out from fitting: one in eight, one of fewer than eight, never the only one.

    >>> held_out(3)
    tensor([False, False,  True])
    """
    every = min(HELD_OUT_EVERY, windows)
    return torch.arange(windows) % every == every - 1 if windows > 1 else torch.zeros(windows, dtype=torch.bool)
