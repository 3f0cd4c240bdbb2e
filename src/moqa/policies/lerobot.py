"""Where lerobot's policies have their parts, by the names that modules have in lerobot 0.6."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moqa.errors import MoqaError
from moqa.policies.adapter import Meeting, Part, PolicyAdapter, parts_of
from moqa.policies.builder import Builder
from moqa.policies.observation import Fields, PolicyInputs

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ACTION, _MOST_BYTES = "action", 96  # bytes of an instruction


class Lerobot(PolicyAdapter):
    """See `PolicyAdapter`."""

    name = "lerobot"
    places: dict[Part, tuple[str, ...]] = {  # noqa: RUF012
        "vision": (
            "model.vlm_with_expert.vlm.model.vision_model", "model.backbone", "diffusion.rgb_encoder.backbone",
            "diffusion.rgb_encoder.*.backbone",
        ),
        "projector": (
            "model.vlm_with_expert.vlm.model.connector", "model.encoder_img_feat_input_proj",
            "diffusion.rgb_encoder.out", "diffusion.rgb_encoder.*.out",
        ),
        # ACT has no language: its encoder is where pictures and the state meet
        "language": ("model.vlm_with_expert.vlm.model.text_model", "model.encoder"),
        "action": ("model.vlm_with_expert.lm_expert", "model.decoder", "diffusion.unet"),
    }  # fmt: skip

    def accepts(self, config: "PretrainedConfig") -> bool:
        """See `PolicyAdapter`."""
        from moqa.policies.lerobot_model import MODEL_TYPE

        return config.model_type == MODEL_TYPE

    def auto_class(self, config: "PretrainedConfig") -> Any:  # noqa: ARG002
        """See `PolicyAdapter`."""
        from moqa.policies.lerobot_model import LerobotPolicy

        return Builder(LerobotPolicy)

    def fields(self, config: "PretrainedConfig") -> Fields:
        """See `PolicyAdapter`."""
        from moqa.policies.lerobot_model import STATE

        shapes = {name: tuple(config.settings["input_features"][name]["shape"]) for name in config.cameras}
        if len(set(shapes.values())) != 1:
            seen = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "no camera"
            raise MoqaError(f"a policy of lerobot sees {seen}", "its cameras must have pictures of one size")
        channels, height, width = next(iter(shapes.values()))
        return Fields((channels * len(shapes), height, width), config.shape(STATE)[0], _MOST_BYTES)

    def robot(self, config: "PretrainedConfig") -> str:  # noqa: ARG002
        """Its folders do not say."""
        return ""

    def actions(self, config: "PretrainedConfig") -> tuple[int, int]:
        """See `PolicyAdapter`."""
        settings = config.settings
        chunk = settings.get("chunk_size") or settings.get("n_action_steps") or 1
        return int(chunk), config.shape(_ACTION, "output_features")[0]

    def meeting(self, model: nn.Module) -> Meeting:
        """See `PolicyAdapter`."""
        words = f"{self.places['language'][0]}.embed_tokens"
        return Meeting(parts_of(self, model)["projector"][0], words if words in dict(model.named_modules()) else "")

    def ids(self, config: "PretrainedConfig", instruction: str) -> Tensor:  # noqa: ARG002
        """Bytes of the text, which lerobot's own processor makes tokens of."""
        found = list(instruction.encode())
        if len(found) > _MOST_BYTES:
            raise MoqaError(f"'{instruction}' is longer than {_MOST_BYTES} bytes", "say it in fewer words")
        return torch.tensor(found + [0] * (_MOST_BYTES - len(found)))

    def act(self, model: nn.Module, seen: PolicyInputs) -> Tensor:
        """See `PolicyAdapter`."""
        texts = [bytes(byte for byte in row if byte).decode() for row in seen.words.tolist()]
        actions: Tensor = model(seen.images, seen.state, texts)
        return actions
