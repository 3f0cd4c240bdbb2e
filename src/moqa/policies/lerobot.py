"""Policies of lerobot from a local folder: lerobot's own classes and processors, inside a model of transformers.

lerobot is imported when one is built (`pip install lerobot`, which needs torchvision). What its folders hold is found
by the names that its modules have in lerobot 0.4.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from moqa.errors import MoqaError, one_line
from moqa.policies.adapter import Meeting, Part, PolicyAdapter
from moqa.policies.builder import Builder
from moqa.policies.observation import Fields, PolicyInputs

MODEL_TYPE = "lerobot"
KINDS = ("smolvla", "act", "diffusion")
_MOST_BYTES = 96  # of an instruction
# what a checkpoint of moqa adds to the file
_OURS = ("quantization_config", "transformers_weights")
_IMAGE, _STATE, _ACTION = "observation.image", "observation.state", "action"


class LerobotConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is not followed
    """The `config.json` of a folder that lerobot wrote.

    >>> LerobotConfig({"type": "act", "input_features": {}, "output_features": {}}).kind
    'act'

    Args:
        settings: what the file holds.
        others: of every configuration of transformers.
    """

    model_type = MODEL_TYPE

    def __init__(self, settings: dict[str, Any] | None = None, **others: Any) -> None:
        self.settings = settings or {}
        self.kind = str(self.settings.get("type", ""))
        super().__init__(**others)

    def shape(self, start: str, of: str = "input_features") -> list[int]:
        """Shape of the first feature whose name begins so; of no numbers if there is none."""
        return next((f["shape"] for name, f in (self.settings.get(of) or {}).items() if name.startswith(start)), [0])


class LerobotPolicy(PreTrainedModel):  # type: ignore[misc]
    """A policy of lerobot: its modules have the names that they have there."""

    config_class = LerobotConfig

    def __init__(self, config: LerobotConfig) -> None:
        super().__init__(config)
        policy, self._processors = _built(json.dumps(config.settings), str(config.name_or_path))
        for name, module in policy.named_children():
            self.add_module(name, module)
        self._policy = (policy,)  # in a tuple: its modules are registered above
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: lerobot's classes have done it."""

    def forward(self, images: Tensor, state: Tensor, instructions: list[str]) -> Tensor:
        """[batch, chunk, action] in the robot's units, from images of 0 to 1, states and texts."""
        before, after = self._processors
        settings = self.config.settings
        names = [name for name in settings["input_features"] if name.startswith(_IMAGE)]
        batch = before({**dict.fromkeys(names, images), _STATE: state, "task": instructions})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # policies that begin with noise begin with the same each time
            found: Tensor = after(self._policy[0].predict_action_chunk(batch))
        return found


class Lerobot(PolicyAdapter):
    """See `PolicyAdapter`."""

    name = "lerobot"
    places: dict[Part, tuple[str, ...]] = {  # noqa: RUF012
        "vision": (
            "model.vlm_with_expert.vlm.model.vision_model", "model.backbone", "diffusion.rgb_encoder.backbone",
        ),
        "projector": (
            "model.vlm_with_expert.vlm.model.connector", "model.encoder_img_feat_input_proj",
            "diffusion.rgb_encoder.out",
        ),
        # ACT has no language: its encoder is where pictures and the state meet
        "language": ("model.vlm_with_expert.vlm.model.text_model", "model.encoder"),
        "action": ("model.vlm_with_expert.lm_expert", "model.decoder", "diffusion.unet"),
    }  # fmt: skip

    def accepts(self, config: PretrainedConfig) -> bool:
        """See `PolicyAdapter`."""
        return config.model_type == MODEL_TYPE

    def auto_class(self, config: PretrainedConfig) -> Any:  # noqa: ARG002
        """See `PolicyAdapter`."""
        return Builder(LerobotPolicy)

    def fields(self, config: PretrainedConfig) -> Fields:
        """See `PolicyAdapter`."""
        channels, height, width = config.shape(_IMAGE)
        return Fields((channels, height, width), config.shape(_STATE)[0], _MOST_BYTES)

    def robot(self, config: PretrainedConfig) -> str:  # noqa: ARG002
        """Its folders do not say."""
        return ""

    def actions(self, config: PretrainedConfig) -> tuple[int, int]:
        """See `PolicyAdapter`."""
        settings = config.settings
        chunk = settings.get("chunk_size") or settings.get("n_action_steps") or 1
        return int(chunk), config.shape(_ACTION, "output_features")[0]

    def meeting(self, model: nn.Module) -> Meeting:
        """See `PolicyAdapter`."""
        modules = dict(model.named_modules())
        projector = next(path for path in self.places["projector"] if path in modules)
        words = f"{self.places['language'][0]}.embed_tokens"
        return Meeting(projector, words if words in modules else "")

    def ids(self, config: PretrainedConfig, instruction: str) -> Tensor:  # noqa: ARG002
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


def lerobot_config(data: dict[str, Any]) -> LerobotConfig | None:
    """The configuration of a folder that lerobot wrote; None if another program did.

    >>> lerobot_config({"model_type": "llama"}) is None
    True
    """
    if "model_type" in data or data.get("type") not in KINDS or not isinstance(data.get("input_features"), dict):
        return None
    return LerobotConfig({key: value for key, value in data.items() if key not in _OURS})


def _built(settings: str, folder: str) -> tuple[Any, tuple[Any, Any]]:
    """A policy with random weights, and what prepares its inputs and its outputs."""
    try:
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies.factory import get_policy_class, make_pre_post_processors
    except ImportError as error:
        raise MoqaError(f"lerobot cannot be imported ({one_line(error)})", "pip install lerobot torchvision") from None
    with TemporaryDirectory(prefix="moqa-lerobot-") as clean:
        (Path(clean) / "config.json").write_text(settings, encoding="utf-8")
        config = PreTrainedConfig.from_pretrained(clean)
    config.device = "cpu"
    policy = get_policy_class(config.type)(config).eval()
    return policy, make_pre_post_processors(config, folder)
