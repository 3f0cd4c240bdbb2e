"""Where the layers of vLLM get their units from: a checkpoint that was opened and checked."""

from functools import cache, cached_property

import torch
from torch import Tensor

from moqa.format.reader import Checkpoint, open_checkpoint
from moqa.integrations.vllm.units import UnitNames
from moqa.runtime.adjusted import Adjustments
from moqa.runtime.load import load_packed
from moqa.runtime.variants import Variants


class UnitSource:
    """The units of a checkpoint in one of vLLM's processes, and what its experts can switch between.

    Args:
        model: folder of the checkpoint, or its Hub id.

    Attributes:
        checkpoint: that was opened and checked.
        units: finds units by the names of vLLM's layers.
        variants: of the model.
        with_experts: decoder layers with routed experts.
        is_whole: whether the process has all decoder layers.

    Raises:
        MoqaError: if it is damaged, or lacks anything that its model needs.
    """

    def __init__(self, model: str) -> None:
        self.checkpoint = _checked(model)
        self.units = UnitNames(self.checkpoint.manifest)
        self.variants = Variants()
        self.with_experts: list[int] = []
        self.is_whole = True
        self._layer: int | None = None  # whose tensors are mapped
        self._tensors: dict[str, Tensor] = {}

    @cached_property
    def adjustments(self) -> Adjustments:
        """Of the running model."""
        return Adjustments(self.checkpoint, self.variants, self.with_experts)

    def stored(self, name: str) -> dict[str, Tensor]:
        """Tensors of a unit by suffix, mapped from its file.

        Raises:
            MoqaError: if the file is not the one that was checked, or no layer asked for some unit.
        """
        unit = self.checkpoint.manifest.units[name]
        if self._layer != unit.layer:
            # all layers have been made before the first of them is filled
            self.units.check_all_found(self.is_whole)
            self.checkpoint.check_file(self.checkpoint.shards[unit.layer + 1], verify=False)
            self._layer, self._tensors = unit.layer, self.checkpoint.layer(unit.layer)
        return unit.scheme.among(self._tensors, name, unit.shape)


@cache
def _checked(model: str) -> Checkpoint:
    checkpoint = open_checkpoint(model)
    # what moqa itself would not load, vLLM must not serve: it computes with memory that nothing was written to
    load_packed(checkpoint, dtype=torch.bfloat16, kernels="reference")
    return checkpoint
