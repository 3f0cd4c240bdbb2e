"""Policies of lerobot from a local folder: lerobot's own classes and processors, inside a model of transformers.

lerobot, which needs Python 3.12, torchvision and a torch below 2.12, is imported when one is built.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from moqa.errors import MoqaError, one_line

MODEL_TYPE = "lerobot"
IMAGE, STATE = "observation.image", "observation.state"
KINDS = ("smolvla", "act", "diffusion")
COMPUTING = ("diffusion",)  # while they are built, to know the shapes of their own outputs
WITH_HISTORY = ("diffusion",)  # see the observations of several steps
# what a checkpoint of moqa adds to the file
_OURS = ("quantization_config", "transformers_weights")


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

    @property
    def cameras(self) -> list[str]:
        """Names of the pictures that it sees, sorted: the channels of one follow those of the other."""
        return sorted(name for name in self.settings.get("input_features") or {} if name.startswith(IMAGE))

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
        """[batch, chunk, action] in the robot's units, from images of 0 to 1 of all cameras, states and texts."""
        before, after = self._processors
        settings, names = self.config.settings, self.config.cameras
        pictures = dict(zip(names, images.chunk(len(names), 1), strict=True))
        batch = before({**pictures, STATE: state, "task": instructions})
        if self.config.kind in WITH_HISTORY:  # as for a robot that stood still so far
            batch |= {name: torch.stack([batch[name]] * settings["n_obs_steps"], 1) for name in (*names, STATE)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # policies that begin with noise begin with the same each time
            found: Tensor = after(self._policy[0].predict_action_chunk(batch))
        return found


def lerobot_config(data: dict[str, Any]) -> LerobotConfig | None:
    """The configuration of a folder that lerobot wrote; None if another program did.

    >>> lerobot_config({"model_type": "llama"}) is None
    True
    """
    if "model_type" in data or data.get("type") not in KINDS or not isinstance(data.get("input_features"), dict):
        return None
    return LerobotConfig({key: value for key, value in data.items() if key not in _OURS})


def _with_values(build: Callable[[], nn.Module]) -> nn.Module:
    """A policy that needs the values of its parameters while it is built: moqa gives them no memory in this thread."""
    with ThreadPoolExecutor(1) as other:
        policy = other.submit(build).result()
    for module in policy.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            module.register_parameter(name, parameter)  # what this thread does with parameters is done when they come
    return policy


def _built(settings: str, folder: str) -> tuple[Any, tuple[Any, Any]]:
    """A policy with random weights, and what prepares its inputs and its outputs."""
    try:
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies.factory import get_policy_class, make_pre_post_processors
    except ImportError as error:
        remedy = "pip install 'lerobot>=0.6', which needs Python 3.12 and torchvision"
        raise MoqaError(f"lerobot cannot be imported ({one_line(error)})", remedy) from None
    with TemporaryDirectory(prefix="moqa-lerobot-") as clean:
        (Path(clean) / "config.json").write_text(settings, encoding="utf-8")
        config = PreTrainedConfig.from_pretrained(clean)
    config.device = "cpu"
    build = partial(get_policy_class(config.type), config)
    policy = (_with_values(build) if config.type in COMPUTING else build()).eval()
    return policy, make_pre_post_processors(config, folder)
