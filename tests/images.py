"""Tiny image classifiers and folders of images, saved as real ones are."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageClassification

CLASSES = ("cat", "dog", "fish", "bird")
SIZE = 32
_NAMES = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: index for index, name in enumerate(CLASSES)}}
MODELS: dict[str, dict] = {
    "resnet": {
        "num_channels": 3, "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 1], "layer_type": "basic",
    },
    "vit": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "image_size": SIZE, "patch_size": 8,
    },
}  # fmt: skip
ROLES = {"resnet": {"convolution"}, "vit": {"attention", "mlp"}}


def save_classifier(name: str, folder: Path) -> Path:
    """A random classifier whose predictions depend on the image, with its image processor."""
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(AutoConfig.for_model(name, **MODELS[name], **_NAMES))
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point() and tensor.dim() > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
            elif key.endswith("running_mean"):
                tensor.normal_(std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    options = {"image_processor_type": "ViTImageProcessor", "size": {"height": SIZE, "width": SIZE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(options))
    return folder


def save_images(folder: Path, each: int, seed: int, size: int = 36) -> Path:
    """Random images, so many of each class."""
    generator = np.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:03}.png")
    return folder
