"""Adjustments of a loaded model: applied and reverted in milliseconds; several can be held, one is in use."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moqa.errors import MoqaError
from moqa.format.adjustment import COLUMNS, Adjustment, LayerChannels, check_fits, read_adjustment
from moqa.format.reader import Checkpoint
from moqa.kernels import Channels, PackedMatrix, Patch
from moqa.runtime.variants import CHANGING, ExpertsVariant, Variants

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class Adjustments:
    """The adjustments of one model (`model.adjustments`).

    >>> model, tokenizer = moqa.load("runs/out")
    >>> _ = model.apply("runs/german")
    >>> model.adjustments.current
    'german'
    >>> model.revert()

    The checkpoint's files and tensors stay unchanged: after `revert` a model computes what it computed before, bit for
    bit.
    """

    def __init__(self, checkpoint: Checkpoint, variants: Variants, layers: Sequence[int]) -> None:
        self._checkpoint, self._variants, self._layers = checkpoint, variants, layers
        self._held: dict[str, Adjustment] = {}

    @property
    def current(self) -> str | None:
        """Name of the adjustment in use; None if there is none."""
        return self._variants.current

    @property
    def names(self) -> list[str]:
        """Names of the adjustments that are held."""
        return list(self._held)

    def hold(self, adjustment: str | Path | Adjustment, name: str | None = None) -> str:
        """Hold an adjustment for `switch`, and return its name.

        Args:
            adjustment: its folder, or one that was read.
            name: to hold it under; None means the name of its distribution.

        Raises:
            MoqaError: if it is damaged, or was made for another checkpoint, the name is taken by another, or a LoRA
                adapts experts.
        """
        self._variants.check_not_adapted()
        read = adjustment if isinstance(adjustment, Adjustment) else read_adjustment(adjustment)
        check_fits(read, self._checkpoint)
        name = name or read.record.name
        layers = {layer: self._variant(read, layer) for layer in self._layers}
        with CHANGING:
            held = self._held.setdefault(name, read)
            if held.record != read.record:
                raise MoqaError(f"another adjustment named {name} is held", "give one of them another name")
            if held is read:
                self._variants.hold(name, layers)
        return name

    def drop(self, name: str) -> None:
        """Forget an adjustment that is not in use.

        Raises:
            MoqaError: if it is in use, or no adjustment of that name is held.
        """
        with CHANGING:
            self._check(name)
            if name == self.current:
                raise MoqaError(f"adjustment {name} is in use", "revert it first")
            self._variants.drop(name)
            del self._held[name]

    def switch(self, name: str | None) -> None:
        """Compute with another adjustment that is held, or with none.

        Raises:
            MoqaError: if no adjustment of that name is held.
        """
        with CHANGING:
            if name is not None:
                self._check(name)
            self._variants.switch(name)

    def apply(self, adjustment: str | Path | Adjustment) -> None:
        """Compute with an adjustment until `revert`.

        Raises:
            MoqaError: as in `hold`, or if one is already applied; the model then stays as it was.
        """
        self._check_none_applied()
        name = self.hold(adjustment)
        with CHANGING:
            self._check_none_applied()
            self.switch(name)

    def revert(self) -> None:
        """Compute with the checkpoint as it is.

        Raises:
            MoqaError: if no adjustment is applied.
        """
        with CHANGING:
            if self.current is None:
                raise MoqaError("no adjustment is applied", "there is nothing to revert")
            self.switch(None)

    def _check_none_applied(self) -> None:
        if self.current is not None:
            raise MoqaError(f"adjustment {self.current} is already applied", "revert it first, or switch")

    def _check(self, name: str) -> None:
        if name not in self._held:
            held = ", ".join(self._held) or "none"
            raise MoqaError(f"no adjustment named {name!r} is held", f"held: {held}")

    def _variant(self, adjustment: Adjustment, layer: int) -> ExpertsVariant:
        patches = [_patch(channels) for channels in adjustment.layer(layer)]
        units, matrices = self._checkpoint.manifest.units, {}
        for name, replaced in adjustment.record.units.items():
            if units[name].layer == layer:
                head, _, projection = name.rpartition(".")
                expert = int(head.rpartition(".")[2])
                matrices[expert, projection] = PackedMatrix(replaced.scheme, replaced.shape, adjustment.unit(name))
        return ExpertsVariant(patches, matrices)


def _patch(stored: LayerChannels) -> Patch:
    matrix = PackedMatrix(stored.part.scheme, stored.shape, stored.tensors)
    channels = Channels(matrix, stored.expert, stored.channel, stored.factor)
    parts = {"gate_proj": None, "up_proj": None, COLUMNS: None, stored.part.projection: channels}
    return Patch(parts["gate_proj"], parts["up_proj"], parts[COLUMNS], stored.part.replaces)


def make_adjustable(
    model: "PreTrainedModel", checkpoint: Checkpoint, variants: Variants, layers: Sequence[int]
) -> None:
    """Give a model the attribute `adjustments`, and the shortcuts `apply` and `revert`.

    Args:
        model: of the checkpoint.
        checkpoint: that adjustments must have been made for.
        variants: of the model.
        layers: indices of those with packed experts.
    """
    model.register_forward_pre_hook(variants.pin)
    model.register_forward_hook(variants.unpin, always_call=True)
    model.adjustments = Adjustments(checkpoint, variants, layers)
    model.apply = partial(_apply, model)
    model.revert = model.adjustments.revert


def _apply(
    model: "PreTrainedModel", what: "str | Path | Adjustment | Callable[[nn.Module], object]"
) -> "PreTrainedModel":
    """`model.apply`: that of the model's class for functions, `Adjustments.apply` for adjustments."""
    if callable(what):
        applied: PreTrainedModel = type(model).apply(model, what)
        return applied
    model.adjustments.apply(what)
    return model
