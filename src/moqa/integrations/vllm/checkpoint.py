"""What vLLM asks of a checkpoint: whether it can be served, and how each of the model's layers is computed."""

from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from moqa.errors import MoqaError
from moqa.integrations.vllm.experts import PackedExpertsMethod
from moqa.integrations.vllm.linear import PackedLinearMethod
from moqa.integrations.vllm.source import UnitSource
from moqa.integrations.vllm.units import place_of

_EXPERT_PARTS = {"gate_proj", "up_proj", "down_proj", "experts"}


class ServedCheckpoint(QuantizationConfig):  # type: ignore[misc]
    """A checkpoint in vLLM; each of its processes has one.

    Attributes:
        source: of the units.
    """

    source: UnitSource

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ServedCheckpoint":  # noqa: ARG003
        """The entry `quantization_config`, which only names the method: `moqa.json` has all else."""
        return cls()

    def get_name(self) -> str:
        """See `QuantizationConfig`."""
        return "moqa"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Activations are bfloat16 or float32."""
        return [torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of the Triton kernels."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """See `QuantizationConfig`."""
        return []

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:  # noqa: ARG002
        """Open the checkpoint, before any other process is started.

        Raises:
            MoqaError: if it is damaged, or lacks anything that its model needs.
        """
        self.source = UnitSource(model_name if revision is None else f"{model_name}@{revision}")

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer is computed; None leaves it to vLLM.

        Raises:
            MoqaError: if the checkpoint lacks what the layer needs, or vLLM was asked for what cannot work.
        """
        source = self.source
        source.is_whole = get_pp_group().world_size == 1
        if isinstance(layer, RoutedExperts):
            _check_options(layer)
            names = source.units.experts(prefix, layer.moe_config.num_experts)
            place = place_of(prefix)
            assert place is not None
            source.with_experts.append(place[0])
            return PackedExpertsMethod(source, layer.moe_config, names)
        if isinstance(layer, LinearBase):
            found = source.units.linear(prefix, self.packed_modules_mapping)
            return UnquantizedLinearMethod() if found is None else PackedLinearMethod(source, found)
        return None


def _check_options(layer: Any) -> None:
    config = get_current_vllm_config()
    if layer.moe_config.moe_parallel_config.enable_eplb:
        raise MoqaError("--enable-eplb moves experts among processes", "packed experts differ in size, leave it out")
    targets = None if config.lora_config is None else config.lora_config.target_modules
    if config.lora_config is not None and (targets is None or _EXPERT_PARTS & set(targets)):
        raise MoqaError(
            "--enable-lora would adapt packed experts, which vLLM does not do",
            "give --lora-target-modules q_proj k_proj v_proj o_proj",
        )
    if layer.apply_router_weight_on_input:
        raise MoqaError("this family multiplies the inputs of experts with their gates", "vLLM cannot serve it packed")
