"""Tiny policies of lerobot itself, saved as lerobot saves them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from transformers import AutoTokenizer, SmolVLMConfig, SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

CAMERAS = ("observation.images.wrist", "observation.images.top")
SIZE = 48  # pixels of a side; a ResNet makes one of 32
REFERENCE = Path(__file__).parents[1] / "reference"


def act(folder: Path) -> Path:
    """Attention of PyTorch, and a ResNet."""
    return _saved(folder, lambda features: ACTConfig(
        **features, chunk_size=4, n_action_steps=4, pretrained_backbone_weights=None, dim_model=64, n_heads=4,
        dim_feedforward=128, n_encoder_layers=2, latent_dim=16, n_vae_encoder_layers=1,
    ))  # fmt: skip


def diffusion(folder: Path) -> Path:
    """A U-Net of convolutions of sequences."""
    return _saved(folder, lambda features: DiffusionConfig(
        **features, n_obs_steps=2, horizon=8, n_action_steps=4, pretrained_backbone_weights=None, crop_ratio=1.0,
        down_dims=(32, 64), spatial_softmax_num_keypoints=16, diffusion_step_embed_dim=32, num_train_timesteps=10,
        num_inference_steps=2,
    ))  # fmt: skip


def smolvla(folder: Path) -> Path:
    """A vision-language model, and an expert of actions beside it."""
    whole = _vision_language(folder.with_name(f"{folder.name}-vlm"))
    return _saved(folder, lambda features: SmolVLAConfig(
        **features, chunk_size=4, n_action_steps=4, vlm_model_name=str(whole), num_vlm_layers=2, num_steps=2,
        resize_imgs_with_padding=(64, 64), tokenizer_max_length=24,
    ))  # fmt: skip


KINDS: dict[str, Callable[[Path], Path]] = {"act": act, "diffusion": diffusion, "smolvla": smolvla}


def _saved(folder: Path, configuration: Callable[[dict[str, Any]], Any]) -> Path:
    config = configuration({
        "input_features": {
            **{name: PolicyFeature(FeatureType.VISUAL, (3, SIZE, SIZE)) for name in CAMERAS},
            "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
        },
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (4,))},
        "device": "cpu",
    })  # fmt: skip
    torch.manual_seed(0)
    policy = get_policy_class(config.type)(config)
    policy.save_pretrained(folder)
    statistics = {
        **{name: {"mean": torch.full((3, 1, 1), 0.5), "std": torch.full((3, 1, 1), 0.3)} for name in CAMERAS},
        "observation.state": {name: value.expand(4) for name, value in _STATISTICS.items()},
        "action": {name: value.expand(4) for name, value in _STATISTICS.items()},
    }
    for pipeline in make_pre_post_processors(config, dataset_stats=statistics):
        pipeline.save_pretrained(folder)
    return folder


_STATISTICS = {
    "mean": torch.tensor(0.1), "std": torch.tensor(0.5), "min": torch.tensor(-1.0), "max": torch.tensor(1.0),
}  # fmt: skip


def _vision_language(folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(
        REFERENCE / "model",
        extra_special_tokens={
            "image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>",
        },
    )  # fmt: skip
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 128}
    config = SmolVLMConfig(
        vision_config={**layers, "image_size": 64, "patch_size": 16}, scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), tie_word_embeddings=False,
        text_config={
            **layers, "model_type": "llama", "num_key_value_heads": 2, "head_dim": 16, "vocab_size": len(tokenizer),
        },
    )  # fmt: skip
    config.save_pretrained(folder)
    SmolVLMProcessor(
        SmolVLMImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 64}), tokenizer,
        SmolVLMVideoProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 64}), image_seq_len=4,
    ).save_pretrained(folder)  # fmt: skip
    return folder
