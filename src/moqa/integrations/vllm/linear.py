"""Linear layers of vLLM with packed matrices, united ones among them: q, k and v may differ in width."""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearMethodBase

from moqa.errors import MoqaError
from moqa.integrations.vllm.memory import WEIGHTS, LayerMemory
from moqa.integrations.vllm.ops import ServedLinear, serve
from moqa.integrations.vllm.parts import HALO, UnitPart, count_of
from moqa.integrations.vllm.source import UnitSource
from moqa.integrations.vllm.threads import use_all_cores
from moqa.runtime.load import choose_kernels


class PackedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """How vLLM makes, fills and computes a linear layer.

    Args:
        source: the checkpoint.
        names: units whose outputs stand side by side.
    """

    def __init__(self, source: UnitSource, names: list[str]) -> None:
        self._source, self._names = source, names

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,  # noqa: ARG002
        output_size: int,  # noqa: ARG002
        params_dtype: torch.dtype,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Give a layer the memory of its part of the units.

        Raises:
            MoqaError: if they cannot be divided so.
        """
        if len(self._names) != len(output_partition_sizes):
            raise MoqaError(
                f"vLLM unites {len(output_partition_sizes)} layers with {self._names[0]}",
                f"the checkpoint has {len(self._names)}",
            )
        sizes = zip(self._names, output_partition_sizes, strict=True)
        parts = {name: self._part(layer, name, (out, input_size_per_partition)) for name, out in sizes}
        layer.moqa_memory, layer.moqa_rows = LayerMemory(self._source, parts), output_partition_sizes
        layer.moqa_memory.allocate(layer)

    def _part(self, layer: Any, name: str, size: tuple[int, int]) -> UnitPart:
        unit = self._source.checkpoint.manifest.units[name]
        by = "rows" if size[0] != unit.shape[0] else "inputs"
        count = count_of(name, unit, size, by)
        # heads of keys and values may be fewer than processes: then several have the same
        index = layer.tp_rank * count // layer.tp_size
        silent = HALO if count > 1 and by == "rows" and unit.scheme.encoding == "trellis" else 0
        return UnitPart(unit.scheme, unit.shape, count, index, by, silent_rows=silent)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Fill a layer's memory."""
        matrices = layer.moqa_memory.fill(layer)
        device = layer.get_parameter(WEIGHTS).device
        use_all_cores(device)
        layer.moqa_served = ServedLinear(list(matrices.values()), layer.moqa_rows, choose_kernels("auto", device))
        serve(layer.get_parameter(WEIGHTS), layer.moqa_served)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., out]."""
        return torch.ops.moqa.linear(x, layer.get_parameter(WEIGHTS), bias, sum(layer.moqa_rows))
