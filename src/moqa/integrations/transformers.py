"""`AutoModelForCausalLM.from_pretrained(OUT)`: packed units in transformers' own loader.

The index of the checkpoint folder lists only the kept tensors, which transformers loads like those of any model; this
module installs the units, mapped from their files. `import torch` imports moqa (`moqa.integrations.torch_backend`), and
`import moqa` registers this module with transformers (`moqa.integrations.on_import`) while transformers itself is being
imported, so other modules of moqa are imported only when a method runs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moqa.errors import MoqaError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@register_quantization_config("moqa")
class MoqaConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The entry `quantization_config` in the `config.json` of a checkpoint.

    >>> from transformers import AutoModelForCausalLM
    >>> config = MoqaConfig(kernels="reference")
    >>> model = AutoModelForCausalLM.from_pretrained("runs/out", quantization_config=config)  # doctest: +SKIP

    Args:
        kernels: see `moqa.load`.
        verify: check the hashes of the files first.
    """

    def __init__(self, kernels: str = "auto", verify: bool = True, **_: Any) -> None:
        super().__init__(quant_method="moqa")
        self.kernels, self.verify = kernels, verify

    @classmethod
    def from_dict(cls, _: dict[str, Any], return_unused_kwargs: bool = False, **__: Any) -> Any:
        """The entry as a folder has it: what is checked, and which kernels compute, is for the user to say."""
        return (cls(), {}) if return_unused_kwargs else cls()

    def get_loading_attributes(self) -> dict[str, Any]:
        """Options that a user may set when loading."""
        return {"kernels": self.kernels, "verify": self.verify}


# so that the user's MoqaConfig counts, not the folder's
auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (MoqaConfig,)


@register_quantizer("moqa")
class MoqaQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces the matrices of a model by packed units."""

    quantization_config: MoqaConfig

    def update_attn_implementation(self, config: "PretrainedConfig") -> "PretrainedConfig":
        """The first method that sees the configuration: weights are in the index, not in a file that it names."""
        config.transformers_weights = None
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Activations are float32 or bfloat16."""
        return dtype if dtype == torch.float32 else torch.bfloat16

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        if not checkpoint_files:
            raise MoqaError("a moqa checkpoint is loaded from its folder", "give from_pretrained the folder")
        from moqa.format.reader import open_checkpoint
        from moqa.runtime.load import choose_kernels, install_units

        self._checkpoint = open_checkpoint(Path(checkpoint_files[0]).parent, self.quantization_config.verify)
        self._kernels = choose_kernels(self.quantization_config.kernels)
        install_units(model, self._checkpoint, self._kernels)
        # transformers initializes every tensor that is not in the index, so packed modules are removed for that time
        self._hidden = _hide_packed(model)

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_: Any) -> None:
        from moqa.runtime.fixed import keep_packed
        from moqa.runtime.load import keep_as_stored

        for parent, name, packed in self._hidden:
            if hasattr(packed, "bias"):
                packed.bias = getattr(parent, name).bias
            setattr(parent, name, packed)
        keep_as_stored(model, self._checkpoint.layer(None), model.dtype, self._kernels)
        keep_packed(model, self._checkpoint.folder)
        model.requires_grad_(False)  # as in `moqa.load`: with a gradient, experts are computed one by one

    def is_serializable(self) -> bool:
        """`save_pretrained` would write another format: copy the folder instead."""
        return False

    @property
    def is_trainable(self) -> bool:
        """A LoRA is, beside packed weights that have no gradients."""
        return True


def _hide_packed(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Replace packed modules by empty ones that only have the biases that are still to be loaded."""
    from moqa.runtime.packed import PackedExperts, PackedLinear

    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, PackedLinear | PackedExperts)
    ]
    for parent, name, child in places:
        empty = nn.Module()
        if not isinstance(child, PackedExperts):
            empty.register_parameter("bias", child.bias)
        setattr(parent, name, empty)
    return places
