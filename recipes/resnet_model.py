"""The reference image classifier: its settings, architecture, image processor, augmentation and score."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cifar10 import CLASSES, read_slice
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessorPil,
)

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's training set, pixels in 0..1
SHIFT = 4  # pixels at most


@dataclass(frozen=True)
class Recipe:
    """What decides the weights."""

    epochs: int = 24
    batch: int = 128
    # The stem divides the size by 4 before the first block: at 64 pixels that block sees 16 x 16, at 32 only 8 x 8.
    size: int = 64
    embedding_size: int = 32
    hidden_sizes: tuple[int, ...] = (32, 64, 128)
    depths: tuple[int, ...] = (3, 3, 3)
    peak_rate: float = 0.1
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    seed: int = 0


def build(recipe: Recipe) -> ResNetForImageClassification:
    config = ResNetConfig(
        embedding_size=recipe.embedding_size,
        hidden_sizes=list(recipe.hidden_sizes),
        depths=list(recipe.depths),
        layer_type="basic",
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )
    torch.manual_seed(recipe.seed)
    return ResNetForImageClassification(config).to(memory_format=torch.channels_last)


def image_processor(recipe: Recipe) -> ViTImageProcessorPil:
    """Resize and normalise, nothing else. Saved under a name that AutoImageProcessor resolves with or without
    torchvision; resnet's own, ConvNext's, would enlarge further and cut the borders off.
    """
    size = {"height": recipe.size, "width": recipe.size}
    return ViTImageProcessorPil(size=size, image_mean=list(MEAN), image_std=list(STD))


def enlarge(images: Tensor, size: int) -> Tensor:
    """uint8 [n, 32, 32, 3] -> float32 [n, 3, size, size], what the image processor gives, a batch at a time; it rounds
    enlarged pixels to whole levels and this does not.
    """
    pixels = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    pixels = functional.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    return pixels.contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, random: np.random.Generator) -> Tensor:
    """Shift every image by up to SHIFT pixels, mirrored at its edges, and flip half of them."""
    count, side = images.shape[:2]
    margins = ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0))
    padded = torch.from_numpy(np.pad(images.numpy(), margins, mode="reflect"))
    along = torch.arange(side)
    rows = torch.from_numpy(random.integers(2 * SHIFT + 1, size=count))[:, None] + along
    columns = torch.from_numpy(random.integers(2 * SHIFT + 1, size=count))[:, None] + along
    flip = torch.from_numpy(random.random(count) < 0.5)
    columns[flip] = columns[flip].flip(1)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def learning_rate(recipe: Recipe, progress: float) -> float:
    """One cycle: linear to the peak over the first 15 % of the run, then half a cosine to 0."""
    rising = progress / 0.15
    return recipe.peak_rate * min(rising, (1 + math.cos(math.pi * max(0.0, progress - 0.15) / 0.85)) / 2)


@torch.no_grad()
def top1(folder: Path, images: list[Image.Image], labels: Tensor) -> float:
    """Share of images whose best class is right, with model and image processor as a user loads them, in float32."""
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    correct = 0
    for start in range(0, len(images), 250):
        inputs = processor(images[start : start + 250], return_tensors="pt")
        correct += int((model(**inputs).logits.argmax(1) == labels[start : start + 250]).sum())
    return correct / len(images)


def top1_of_slice(folder: Path, images: Path, count: int | None = None) -> float:
    """The same over the first images of an image folder, classes in turn."""
    files, labels = read_slice(images)
    opened = [Image.open(file).convert("RGB") for file in files[:count]]
    return top1(folder, opened, labels[:count])
