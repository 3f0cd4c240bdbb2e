"""What PEFT must know of packed models; `import moqa` has this module imported while PEFT imports what it changes.

PEFT knows which families keep their experts in stacked parameters, and turns the names of experts' matrices into those
of the stacks: `target_modules=["gate_proj", "up_proj", "down_proj"]` would find nothing in a packed model, which has
none.
"""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

from peft.utils import transformers_weight_conversion as conversion
from torch import nn


def _unless_packed(convert: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT leaves names as they are where a model is not of transformers."""

    @wraps(convert)
    def converted(*args: Any, **kwargs: Any) -> Any:
        from moqa.runtime.packed import PackedLinear

        given = signature(convert).bind(*args, **kwargs).arguments
        if any(isinstance(module, PackedLinear) for module in given["model"].modules()):
            given["model"] = nn.Module()
        return convert(**given)

    return converted


for _name in ("convert_peft_config_for_transformers", "convert_peft_adapter_state_dict_for_transformers"):
    if hasattr(conversion, _name):  # parts of PEFT that are not public
        setattr(conversion, _name, _unless_packed(getattr(conversion, _name)))
