"""Tiny random policies of every kind, and demonstrations for them."""

import json
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from torch import nn

from moqa.vla.environment import ROBOT

REFERENCE = Path(__file__).parents[1] / "reference"
INSTRUCTIONS = {"drawer-open": "open the drawer", "drawer-close": "close the drawer"}
SIZE = 24  # pixels of a side


def small(folder: Path) -> Path:
    from moqa.policies.small import SmallPolicy, SmallPolicyConfig

    config = SmallPolicyConfig(
        image_size=SIZE, stem=(32, 32, 32), vision_layers=1, width=64, layers=2, heads=2, robot=ROBOT,
        words=["<pad>", "close", "drawer", "open", "the"], chunk=4,
    )  # fmt: skip
    torch.manual_seed(0)
    SmallPolicy(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def openvla(folder: Path) -> Path:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=SIZE, patch_size=12),
        text_config=LlamaConfig(**sizes, vocab_size=8192, tie_word_embeddings=False),
        image_token_id=8000, image_seq_length=4, tie_word_embeddings=False,
    )  # fmt: skip
    config.n_action_bins = 256
    config.norm_stats = {ROBOT: {"action": {"q01": [-1.0] * 4, "q99": [1.0] * 4}}}
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    for path in (REFERENCE / "model").glob("tokenizer*"):
        shutil.copy(path, folder)
    pixels = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


def lerobot_stand_in(folder: Path) -> Path:
    """A policy whose modules have the names that they have in SmolVLA, for where lerobot is not installed."""
    _stand_in()
    shape = {"type": "VISUAL", "shape": [3, SIZE, SIZE]}
    settings = {
        "type": "smolvla", "chunk_size": 4, "output_features": {"action": {"type": "ACTION", "shape": [4]}},
        "input_features": {"observation.images.top": shape, "observation.state": {"type": "STATE", "shape": [4]}},
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    save_file(
        {name: value.bfloat16() for name, value in _Policy(None).state_dict().items()}, folder / "model.safetensors"
    )
    return folder


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # of the kinds that ACT's and the diffusion policy's layers have
        self.self_attn = nn.MultiheadAttention(64, 4, batch_first=True)
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.up_proj, self.down_proj = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        x = x + self.self_attn(x, x, x)[0]
        x = x + self.conv(x.mT).mT
        return x + self.down_proj(torch.relu(self.up_proj(x)))


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class _Policy(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.model, both, vlm, parts = nn.Module(), nn.Module(), nn.Module(), nn.Module()
        self.model.vlm_with_expert, both.vlm, vlm.model = both, vlm, parts
        parts.vision_model, parts.connector, parts.text_model = _Layers(), nn.Linear(64, 64), _Layers()
        parts.text_model.embed_tokens = nn.Embedding(16, 64)
        both.lm_expert, self.model.action_out_proj = _Layers(), nn.Linear(64, 4)

    @torch.no_grad()
    def predict_action_chunk(self, batch):
        both = self.model.vlm_with_expert
        parts = both.vlm.model
        pixels = batch["observation.images.top"].flatten(1).unfold(1, 64, 64)
        seen = parts.connector(parts.vision_model(pixels))
        words = parts.text_model.embed_tokens(batch["tokens"])
        read = parts.text_model(torch.cat([words, seen], 1)).mean(1, keepdim=True)
        noise = torch.randn(1, 4, 64)
        return self.model.action_out_proj(both.lm_expert(read + noise + batch["observation.state"].mean()))


def _stand_in() -> None:
    def before(batch):
        tokens = [[len(word) % 16 for word in text.split()][:3] for text in batch.pop("task")]
        return batch | {"tokens": torch.tensor([ids + [0] * (3 - len(ids)) for ids in tokens])}

    names = ("lerobot", "lerobot.configs", "lerobot.configs.policies", "lerobot.policies", "lerobot.policies.factory")
    modules = {name: sys.modules.setdefault(name, ModuleType(name)) for name in names}

    class PreTrainedConfig:
        @classmethod
        def from_pretrained(cls, folder):
            found = cls()
            found.type = json.loads((Path(folder) / "config.json").read_text())["type"]
            return found

    modules["lerobot.configs.policies"].PreTrainedConfig = PreTrainedConfig
    factory = modules["lerobot.policies.factory"]
    factory.get_policy_class = lambda kind: _Policy
    factory.make_pre_post_processors = lambda config, folder: (before, lambda actions: actions)


# `make test-lerobot` has lerobot itself
MAKERS: dict[str, Callable[[Path], Path]] = {"small": small, "openvla": openvla}
if find_spec("lerobot") is None:
    MAKERS["lerobot"] = lerobot_stand_in
else:
    from lerobot_policies import KINDS

    MAKERS |= {f"lerobot {kind}": make for kind, make in KINDS.items()}


def demonstrations(
    folder: Path, robot: str = ROBOT, action: int = 4, size: int = SIZE, channels: int = 3
) -> Path:  # fmt: skip
    """Ten random episodes of five observations, with pictures of some size, for each of two tasks."""
    folder.mkdir()
    random = torch.Generator().manual_seed(1)
    for task, instruction in INSTRUCTIONS.items():
        count = 50
        tensors = {
            "images": torch.randint(0, 256, (count, size, size, channels), generator=random, dtype=torch.uint8),
            "state": torch.rand(count, 4, generator=random),
            "actions": torch.rand(count, 4, action, generator=random) * 2 - 1,
            "episodes": torch.arange(count) // 5,
        }
        save_file(tensors, folder / f"{task}.safetensors", {"robot": robot, "instruction": instruction})
    return folder
