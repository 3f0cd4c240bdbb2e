"""Policies like OpenVLA: a transformers model of images and text that writes actions as tokens.

What makes such a model a policy are two keys of its `config.json`, as OpenVLA (arXiv 2406.09246, section 3) has them:
`n_action_bins`, the last tokens of the vocabulary that stand for actions, and `norm_stats`, by which robot they are
scaled back: robot -> `action` -> `q01` and `q99`.
"""

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moqa.errors import MoqaError
from moqa.policies.adapter import Meeting, Part, PolicyAdapter
from moqa.policies.observation import Fields, PolicyInputs
from moqa.storage.files import read_object

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_PROMPT = "In: What action should the robot take to {}?\nOut:"
_MOST_WORDS = 48  # tokens of a prompt; shorter ones are filled up on the left
_PAD = 0  # its tokens are not attended to


class OpenVLA(PolicyAdapter):
    """See `PolicyAdapter`."""

    name = "openvla"
    places: dict[Part, tuple[str, ...]] = {  # noqa: RUF012
        "vision": ("model.vision_tower", "model.vision_model"),
        "projector": ("model.multi_modal_projector", "model.connector"),
        "language": ("model.language_model", "model.text_model"),
        "action": ("lm_head",),
    }

    def accepts(self, config: "PretrainedConfig") -> bool:
        """See `PolicyAdapter`."""
        from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

        named = isinstance(getattr(config, "n_action_bins", None), int) and bool(getattr(config, "norm_stats", None))
        return named and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    def auto_class(self, config: "PretrainedConfig") -> Any:  # noqa: ARG002
        """See `PolicyAdapter`."""
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText

    def fields(self, config: "PretrainedConfig") -> Fields:
        """See `PolicyAdapter`."""
        size = int(config.vision_config.image_size)
        return Fields((3, size, size), 0, _MOST_WORDS)

    def robot(self, config: "PretrainedConfig") -> str:
        """See `PolicyAdapter`."""
        return str(next(iter(config.norm_stats)))

    def actions(self, config: "PretrainedConfig") -> tuple[int, int]:
        """See `PolicyAdapter`."""
        return 1, len(_scale(config)[0])

    def meeting(self, model: nn.Module) -> Meeting:
        """See `PolicyAdapter`."""
        modules = dict(model.named_modules())
        projector = next(path for path in self.places["projector"] if path in modules)
        language = next(path for path in self.places["language"] if path in modules)
        return Meeting(projector, f"{language}.embed_tokens")

    def ids(self, config: "PretrainedConfig", instruction: str) -> Tensor:
        """See `PolicyAdapter`."""
        found = _tokenizer(config.name_or_path)(_PROMPT.format(instruction.lower()))["input_ids"]
        if len(found) > _MOST_WORDS:
            raise MoqaError(f"'{instruction}' has {len(found)} tokens with its prompt", f"{_MOST_WORDS} are read")
        return torch.tensor([_PAD] * (_MOST_WORDS - len(found)) + found)

    def act(self, model: nn.Module, seen: PolicyInputs) -> Tensor:
        """The likeliest bins, one number of the action after the other; their gradient is that of the mean bin."""
        config: Any = model.config
        low, high = (torch.tensor(values) for values in _scale(config))
        count, bins = len(seen.images), int(config.n_action_bins)
        # bins of equal width from -1 to 1; the last token of the vocabulary is the first bin
        centres = torch.linspace(1, -1, 2 * bins + 1)[1::2]
        mean, deviation = _pixels(config.name_or_path)
        pixels = (seen.images - mean[:, None, None]) / deviation[:, None, None]
        images = torch.full((count, _image_tokens(config)), config.image_token_id)
        ids, shown = torch.cat([images, seen.words], 1), torch.cat([images >= 0, seen.words != _PAD], 1).long()
        cache, numbers, options = None, [], {"pixel_values": pixels}
        for _ in range(len(low)):
            place = (shown.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            out: Any = model(
                input_ids=ids,
                attention_mask=shown,
                position_ids=place,
                past_key_values=cache,
                use_cache=True,
                **options,
            )
            chances = out.logits[:, -1, -bins:].float().softmax(-1)
            likeliest, expected = chances.argmax(-1), chances @ centres
            numbers.append(centres[likeliest] + expected - expected.detach())
            ids = (likeliest + out.logits.shape[-1] - bins)[:, None]
            shown = torch.cat([shown, torch.ones(count, 1, dtype=shown.dtype)], 1)
            cache, options = out.past_key_values, {}
        action = torch.stack(numbers, 1)
        return (low + (action + 1) / 2 * (high - low))[:, None]


def _scale(config: Any) -> tuple[list[float], list[float]]:
    """Smallest and largest value of each number of an action."""
    action = next(iter(config.norm_stats.values()))["action"]
    return action["q01"], action["q99"]


def _image_tokens(config: Any) -> int:
    """Tokens that stand for an image."""
    found = getattr(config, "image_seq_length", None)
    return int(found or (config.vision_config.image_size // config.vision_config.patch_size) ** 2)


@cache
def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@cache
def _pixels(folder: str) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the pixels of each channel, as the folder's image processor has them."""
    path = Path(folder) / "preprocessor_config.json"
    try:
        found = read_object(path)
        return torch.tensor(found["image_mean"]), torch.tensor(found["image_std"])
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise MoqaError(f"{path} does not say how pixels are scaled", str(error)) from None
