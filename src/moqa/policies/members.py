"""The kinds of policies that moqa knows."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from moqa.errors import MoqaError
from moqa.policies.adapter import Meeting, Part, PolicyAdapter
from moqa.policies.builder import Builder
from moqa.policies.lerobot import Lerobot
from moqa.policies.observation import Fields, PolicyInputs
from moqa.policies.openvla import OpenVLA

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Small(PolicyAdapter):
    """moqa's own small policy, see `moqa.policies.small`."""

    name = "small"
    places: dict[Part, tuple[str, ...]] = {  # noqa: RUF012
        "vision": ("vision_encoder",), "projector": ("projector",), "language": ("language_model",),
        "action": ("action_head",),
    }  # fmt: skip

    def accepts(self, config: "PretrainedConfig") -> bool:
        """See `PolicyAdapter`."""
        from moqa.policies.small import MODEL_TYPE

        return config.model_type == MODEL_TYPE

    def auto_class(self, config: "PretrainedConfig") -> Any:  # noqa: ARG002
        """See `PolicyAdapter`."""
        from moqa.policies.small import SmallPolicy

        return Builder(SmallPolicy)

    def fields(self, config: "PretrainedConfig") -> Fields:
        """See `PolicyAdapter`."""
        return Fields((3, config.image_size, config.image_size), len(config.state_mean), config.most_words)

    def robot(self, config: "PretrainedConfig") -> str:
        """See `PolicyAdapter`."""
        return str(config.robot)

    def actions(self, config: "PretrainedConfig") -> tuple[int, int]:
        """See `PolicyAdapter`."""
        return config.chunk, config.action_size

    def meeting(self, model: nn.Module) -> Meeting:  # noqa: ARG002
        """See `PolicyAdapter`."""
        return Meeting("projector", "language_model.embed_tokens")

    def ids(self, config: "PretrainedConfig", instruction: str) -> Tensor:
        """See `PolicyAdapter`."""
        found: Tensor = config.ids(instruction)
        return found

    def act(self, model: nn.Module, seen: PolicyInputs) -> Tensor:
        """See `PolicyAdapter`."""
        actions: Tensor = model(seen.images, seen.state, seen.words)
        return actions


ADAPTERS: tuple[PolicyAdapter, ...] = (Small(), OpenVLA(), Lerobot())


def adapter_of(config: "PretrainedConfig") -> PolicyAdapter:
    """The adapter of a policy's configuration.

    Raises:
        MoqaError: if it is no policy.
    """
    found = next((adapter for adapter in ADAPTERS if adapter.accepts(config)), None)
    if found is None:
        raise MoqaError(f"{config.model_type} is no policy", f"moqa knows {', '.join(a.name for a in ADAPTERS)}")
    return found
