"""Train a small ResNet of transformers, from scratch, on the images that recipes/cifar10.py collects.

    python recipes/train_resnet.py --images runs/cifar10 -o runs/resnet

Writes a folder that AutoModelForImageClassification and AutoImageProcessor load. The weights depend on the options
alone (same machine, threads and torch). An interrupted run goes on after its last complete epoch when the same command
is given again.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from cifar10 import Split, read_split
from PIL import Image
from resnet_model import Recipe, augment, build, enlarge, image_processor, learning_rate, top1
from torch import nn
from torch.nn import functional

from moqa.errors import MoqaError


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Split, recipe: Recipe, epoch: int
) -> tuple[float, float]:
    """One pass; returns mean loss and top-1 on the augmented images. A function of the seed and the epoch."""
    random = np.random.default_rng([recipe.seed, epoch])
    order = torch.from_numpy(random.permutation(len(data["labels"])))
    steps = len(order) // recipe.batch
    losses, correct = 0.0, 0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, (epoch + (step + 1) / steps) / recipe.epochs)
        taken = order[step * recipe.batch : (step + 1) * recipe.batch]
        pixels, labels = enlarge(augment(data["images"][taken], random), recipe.size), data["labels"][taken]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(pixel_values=pixels).logits.float()
        loss = functional.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
        if not math.isfinite(loss.item()):
            raise MoqaError(f"the loss is {loss.item()} in epoch {epoch + 1}", "try a lower --peak-rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += loss.item()
        correct += int((logits.argmax(1) == labels).sum())
    return losses / steps, correct / (steps * recipe.batch)


def train(
    images: Path, out: Path, recipe: Recipe, on_epoch: Callable[[int, float, float, float], None] | None = None
) -> float:
    """Train, write model and image processor to `out`, and return top-1 on the complete test set."""
    if (out / "model.safetensors").exists():
        raise MoqaError(f"{out} already holds a finished model", "choose another folder with -o")
    data, test = read_split(images, "train"), read_split(images, "test")
    if len(data["labels"]) < recipe.batch:
        raise MoqaError(f"{images} holds {len(data['labels'])} images to train on", f"a batch takes {recipe.batch}")
    out.mkdir(parents=True, exist_ok=True)
    model = build(recipe).train()
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": weights, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=recipe.peak_rate, momentum=0.9, nesterov=True)
    made_from = {"recipe": json.loads(json.dumps(asdict(recipe))), "images": len(data["labels"])}
    checkpoint, first, seconds = out / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["made_from"] != made_from:
            raise MoqaError(f"{checkpoint} is of a run with another recipe", "delete it or choose another -o")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["epoch"], state["seconds"]

    for epoch in range(first, recipe.epochs):
        started = time.monotonic()
        loss, correct = train_epoch(model, optimizer, data, recipe, epoch)
        seconds += time.monotonic() - started
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
        torch.save(state | {"seconds": seconds, "made_from": made_from}, out / "checkpoint.unfinished")
        (out / "checkpoint.unfinished").replace(checkpoint)
        if on_epoch is not None:
            on_epoch(epoch + 1, loss, correct, time.monotonic() - started)

    image_processor(recipe).save_pretrained(out)
    model.to(torch.bfloat16, memory_format=torch.contiguous_format).save_pretrained(out)
    score = top1(out, [Image.fromarray(image) for image in test["images"].numpy()], test["labels"])
    record = made_from | {"seconds": round(seconds), "top1": {"test": score}}
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    checkpoint.unlink(missing_ok=True)
    return score


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small image classifier like the reference model's.")
    parser.add_argument("--images", type=Path, required=True, help="folder that recipes/cifar10.py wrote")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for checkpoints and the model")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs, help=f"default: {Recipe.epochs}")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--peak-rate", type=float, default=Recipe.peak_rate, help=f"default: {Recipe.peak_rate}")
    options = parser.parse_args()
    if options.epochs < 1 or options.seed < 0 or options.peak_rate <= 0:
        raise SystemExit("train_resnet: --epochs and --peak-rate must be above 0, --seed at least 0")
    recipe = Recipe(epochs=options.epochs, seed=options.seed, peak_rate=options.peak_rate)

    def show(epoch: int, loss: float, correct: float, seconds: float) -> None:
        print(f"epoch {epoch:3d}  loss {loss:.3f}  top-1 {correct:.3f}  {seconds:4.0f} s", flush=True)

    try:
        score = train(options.images, options.out, recipe, on_epoch=show)
    except (MoqaError, OSError) as error:
        raise SystemExit(f"train_resnet: {error}") from None
    print(f"top-1 on the complete test set {score:.4f}")


if __name__ == "__main__":
    main()
