"""Routed experts of vLLM with packed matrices: each expert's projections have widths of their own, in one call."""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from moqa.errors import MoqaError
from moqa.integrations.vllm.memory import WEIGHTS, LayerMemory
from moqa.integrations.vllm.ops import ServedExperts, serve
from moqa.integrations.vllm.parts import HALO, UnitPart, count_of
from moqa.integrations.vllm.source import UnitSource
from moqa.integrations.vllm.threads import use_all_cores
from moqa.integrations.vllm.units import PROJECTIONS, place_of
from moqa.kernels import ACTIVATIONS, ExpertStack
from moqa.runtime.load import choose_kernels


class PackedExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """How vLLM makes, fills and computes the routed experts of a layer.

    Args:
        source: the checkpoint.
        moe: what vLLM says of the layer.
        names: by projection, the units of all experts.
    """

    def __init__(self, source: UnitSource, moe: Any, names: dict[str, list[str]]) -> None:
        super().__init__(moe)
        self._source, self._names = source, names
        if moe.activation.value not in ACTIVATIONS or moe.has_bias:
            raise MoqaError(
                f"experts with {'biases' if moe.has_bias else moe.activation.value} are not served with vLLM",
                f"known are {', '.join(ACTIVATIONS)} without biases",
            )

    def create_weights(
        self,
        layer: Any,
        num_experts: int,  # noqa: ARG002
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Give a layer the memory of its experts, or of its part of all experts.

        Raises:
            MoqaError: if they cannot be divided so.
        """
        places = layer.expert_map
        local = list(range(len(self._names["up_proj"])))
        if places is not None:
            local = [expert for _, expert in sorted((int(place), e) for e, place in enumerate(places) if place >= 0)]
        units = self._source.checkpoint.manifest.units
        width = intermediate_size_per_partition
        sizes = {"gate_proj": (width, hidden_size), "up_proj": (width, hidden_size), "down_proj": (hidden_size, width)}
        first = self._names["up_proj"][0]
        count = count_of(first, units[first], sizes["up_proj"], "rows")
        schemes = [units[name].scheme for part in PROJECTIONS[:2] for name in self._names[part]]
        silent = HALO if count > 1 and any(scheme.encoding == "trellis" for scheme in schemes) else 0
        parts = {}
        for projection in PROJECTIONS:
            by = "inputs" if projection == "down_proj" else "rows"
            more = {"silent_inputs" if by == "inputs" else "silent_rows": silent}
            for name in (self._names[projection][expert] for expert in local):
                unit = units[name]
                index = self.moe.tp_rank if count_of(name, unit, sizes[projection], by) > 1 else 0
                parts[name] = UnitPart(unit.scheme, unit.shape, count, index, by, **more)
        layer.moqa_local, layer.moqa_memory = local, LayerMemory(self._source, parts)
        layer.moqa_memory.allocate(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Fill a layer's memory."""
        matrices = layer.moqa_memory.fill(layer)
        gate, up, down = ([matrices[self._names[part][expert]] for expert in layer.moqa_local] for part in PROJECTIONS)
        device = layer.get_parameter(WEIGHTS).device
        use_all_cores(device)
        place = place_of(layer.layer_name)
        assert place is not None
        stack = ExpertStack(gate, up, down, self.moe.activation.value)
        layer.moqa_served = ServedExperts(stack, choose_kernels("auto", device), self._source.variants, place[0])
        serve(layer.get_parameter(WEIGHTS), layer.moqa_served)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Nothing that vLLM's own kernels would need."""

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,  # noqa: ARG002
        shared_experts_input: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]; experts of other processes add nothing."""
        weights = layer.get_parameter(WEIGHTS)
        return torch.ops.moqa.experts(x, weights, topk_ids, topk_weights, layer.expert_map)
