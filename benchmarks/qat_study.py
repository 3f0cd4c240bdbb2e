"""Training with the rounding in the loop on the reference's ResNet: SiLQ's steps, MQAT's order, ZAQ without data.

Reads the images of recipes/cifar10.py (`python recipes/cifar10.py -o runs/cifar10`). Adds rows to
runs/trained/qat.json and writes docs/results/qat.md; rows that are there are kept. Each run is named, and can be
chosen: `benchmarks/qat_study.py --only silq`.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from itertools import permutations, repeat
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, kl_div, l1_loss
from torch.nn.utils import parametrize
from transformers import AutoModelForImageClassification

from moqa.format.scheme import Scheme
from moqa.qat import FakeQuantized, Inputs, prepare
from moqa.qat.inputs import TrainedRange

ROOT = Path(__file__).parents[1]
MODEL, IMAGES = ROOT / "reference" / "image" / "model", ROOT / "runs" / "cifar10"
SUMMARY, PAGE = ROOT / "runs" / "trained" / "qat.json", ROOT / "docs" / "results" / "qat.md"
BATCH, SIDE, TESTED = 64, 64, 2000
# the stem and the classifier stay, as in the project's plans
KEEP = ("*embedder.embedder*", "classifier*")
MODULES = ("stages.0", "stages.1", "stages.2")
SCHEME, INPUTS = Scheme(width=2, group_size=64), Inputs(4, trained=True)
STEPS = 120
# learning rates of weights, and of scales and ranges, which are relative
RATE, GRID_RATE = 1e-4, 1e-3


def pixels(images: Tensor) -> Tensor:
    """[n, 3, side, side] from uint8 [n, 32, 32, 3], as the model's image processor makes them."""
    mean_, deviation = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.247, 0.2435, 0.2616])
    scaled = ((images / 255 - mean_) / deviation).permute(0, 3, 1, 2)
    return interpolate(scaled, size=(SIDE, SIDE), mode="bilinear", align_corners=False)


class Data:
    """Images to train on, and others to measure on."""

    def __init__(self) -> None:
        train, test = (load_file(IMAGES / f"{name}.safetensors") for name in ("train", "test"))
        self.train, self.labels = train["images"], train["labels"]
        self.test, self.truth = test["images"][:TESTED], test["labels"][:TESTED]

    def batches(self, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random images with their labels, half of them mirrored."""
        random = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            taken = torch.randint(len(self.labels), (BATCH,), generator=random)
            images = self.train[taken]
            mirrored = torch.rand(BATCH, generator=random) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(2), images)
            yield pixels(images), self.labels[taken]


def logits(model: nn.Module, x: Tensor) -> Tensor:
    return model(pixel_values=x).logits


def original() -> nn.Module:
    return AutoModelForImageClassification.from_pretrained(MODEL, dtype=torch.float32).eval()


@torch.no_grad()
def quality(model: nn.Module, teacher: nn.Module, data: Data) -> dict[str, float]:
    """Top-1, and divergence from the original, on images that no training sees."""
    right, divergence = 0, 0.0
    for images, truth in zip(data.test.split(200), data.truth.split(200), strict=True):
        x = pixels(images)
        found, wanted = logits(model, x).log_softmax(-1), logits(teacher, x).log_softmax(-1)
        right += int((found.argmax(-1) == truth).sum())
        divergence += float(kl_div(found, wanted, log_target=True, reduction="sum"))
    return {"accuracy": right / TESTED, "kl_known": divergence / TESTED}


def distilled(student: Tensor, teacher: Tensor) -> Tensor:
    return kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")


def quantized(model: nn.Module, data: Data, seed: int, scheme: Scheme | dict[str, Scheme] = SCHEME) -> FakeQuantized:
    """The model with rounded weights and inputs, whose ranges have seen one batch."""
    found = prepare(model, scheme, inputs=INPUTS, keep=KEEP)
    with torch.no_grad():
        logits(model, next(data.batches(1, seed))[0])
    return found


def grids(model: nn.Module) -> list[nn.Parameter]:
    """Scales, zero-points and ranges."""
    return [p for name, p in model.named_parameters() if name.rpartition(".")[2] in ("growth", "shift", "step")]


def optimizer_of(model: nn.Module, with_grids: bool = True) -> torch.optim.Optimizer:
    of_grids = grids(model)
    others = [p for p in model.parameters() if not any(p is one for one in of_grids)]
    return torch.optim.Adam([
        {"params": others, "peak": RATE}, *([{"params": of_grids, "peak": GRID_RATE}] if with_grids else []),
    ])  # fmt: skip


def set_rates(optimizer: torch.optim.Optimizer, done: float) -> None:
    """Rates fall by half a cosine."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * done))


def train(
    model: nn.Module, teacher: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], steps: int, *,
    with_grids: bool = True, by_labels: bool = False,
) -> None:  # fmt: skip
    """Adam with a rate that falls by half a cosine; norms keep the statistics of the original."""
    optimizer = optimizer_of(model, with_grids)
    for step, (x, labels) in enumerate(batches):
        set_rates(optimizer, step / steps)
        with torch.no_grad():
            wanted = logits(teacher, x)
        found = logits(model, x)
        loss = cross_entropy(found, labels) if by_labels else distilled(found, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def silq(data: Data, seed: int) -> Iterator[dict[str, Any]]:
    """Calibrated only; then trained without and with LSQ, by labels and by distillation."""
    settings: list[tuple[str, dict[str, bool] | None]] = [
        ("calibrated only", None),
        ("labels, fixed grids", {"by_labels": True, "with_grids": False}),
        ("labels, trained grids", {"by_labels": True}),
        ("distillation, fixed grids", {"with_grids": False}),
        ("distillation, trained grids", {}),
    ]
    for setting, options in settings:
        model, teacher = original(), original()
        trained, began = quantized(model, data, seed), time.perf_counter()
        if options is not None:
            train(model, teacher, data.batches(STEPS, seed), STEPS, **options)
        yield row("silq", setting, trained, seed, quality(model, teacher, data), began)


def mqat(data: Data, seed: int) -> Iterator[dict[str, Any]]:
    """Stages one after the other, in every order, and all at once in as many steps."""
    for order in [*permutations(range(len(MODULES))), None]:
        model, teacher = original(), original()
        trained, began = quantized(model, data, seed), time.perf_counter()
        if order is None:
            train(model, teacher, data.batches(STEPS, seed), STEPS)
            setting = "all modules at once"
        else:
            setting = "order " + " ".join(str(1 + module) for module in order)
            in_turn(model, teacher, data, seed, order)
        yield row("mqat", setting, trained, seed, quality(model, teacher, data), began)


def in_turn(model: nn.Module, teacher: nn.Module, data: Data, seed: int, order: tuple[int, ...]) -> None:
    """Quantize and train one module after the other; those whose turn has not come compute as they are."""
    each, batches = STEPS // len(order), data.batches(STEPS, seed)
    waiting = {number: switched_off(model, MODULES[number]) for number in order}
    for number in order:
        waiting.pop(number)()
        train(model, teacher, (next(batches) for _ in range(each)), each)


def switched_off(model: nn.Module, module: str) -> Callable[[], None]:
    """Let the layers of a module compute without rounding, until what is returned is called.

    Then their grids and ranges begin anew: their weights and inputs have changed meanwhile.
    """
    inside = [part for name, part in model.named_modules() if f"{module}." in name]
    grids = [part for part in inside if parametrize.is_parametrized(part)]
    ranges = [part for part in inside if isinstance(part, TrainedRange)]
    parts = [*(owner.parametrizations.weight[0] for owner in grids), *ranges]
    for part in parts:
        part.forward = lambda values: values

    def on() -> None:
        for part in parts:
            del part.forward
        for owner in grids:
            owner.parametrizations.weight[0].begin(owner.parametrizations.weight.original)
        for one in ranges:
            one.start_again()

    return on


class Generator(nn.Module):
    """Makes images from noise, as ZAQ's does."""

    def __init__(self, noise: int = 256, width: int = 64) -> None:
        super().__init__()
        self.noise, self._first = noise, SIDE // 4
        self._linear = nn.Linear(noise, width * self._first**2)
        self._layers = nn.Sequential(
            nn.BatchNorm2d(width), nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width), nn.LeakyReLU(0.2), nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width // 2, 3, padding=1), nn.BatchNorm2d(width // 2), nn.LeakyReLU(0.2),
            nn.Conv2d(width // 2, 3, 3, padding=1), nn.Tanh(), nn.BatchNorm2d(3, affine=False),
        )  # fmt: skip

    def forward(self, count: int, random: torch.Generator) -> Tensor:
        hidden = self._linear(torch.randn(count, self.noise, generator=random))
        return self._layers(hidden.view(count, -1, self._first, self._first))


def zaq(data: Data, seed: int) -> Iterator[dict[str, Any]]:
    """Without training, on noise, on images of an adversarial generator, and on real ones."""
    for setting in ("no training", "noise", "generator, no data", "real images"):
        model, teacher, random = original(), original(), torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        trained, began = prepare(model, SCHEME, inputs=INPUTS, keep=KEEP), time.perf_counter()
        generator = Generator()
        noise = (
            (torch.randn(BATCH, 3, SIDE, SIDE, generator=one), torch.zeros(0)) for one in repeat(random, 1 + STEPS)
        )
        with torch.no_grad():  # without data, ranges begin with what there is
            logits(model, next(data.batches(1, seed) if setting == "real images" else noise)[0])
        if setting == "noise":
            train(model, teacher, noise, STEPS)
        elif setting == "real images":
            train(model, teacher, data.batches(STEPS, seed), STEPS)
        elif setting == "generator, no data":
            adversarial(model, teacher, generator, random)
        yield row("zaq", setting, trained, seed, quality(model, teacher, data), began)


def adversarial(model: nn.Module, teacher: nn.Module, generator: Generator, random: torch.Generator) -> None:
    """Of six steps, five bring the model closer to the original, and one makes images on which they differ more."""
    learns = optimizer_of(model)
    opposes = torch.optim.Adam(generator.parameters(), lr=1e-3)
    for step in range(STEPS):
        set_rates(learns, step / STEPS)
        attacks = step % 6 == 5
        images = generator(BATCH, random)
        images = images if attacks else images.detach()
        with torch.set_grad_enabled(attacks):
            wanted = teacher(pixel_values=images, output_hidden_states=True)
        found = model(pixel_values=images, output_hidden_states=True)
        # the paper also compares attention maps of all layers; here, the features of all stages
        apart = l1_loss(found.logits, wanted.logits) + mean_apart(found.hidden_states, wanted.hidden_states)
        loss = -apart - 0.1 * wanted.hidden_states[-1].abs().mean() if attacks else apart
        learns.zero_grad()
        opposes.zero_grad()
        loss.backward()
        (opposes if attacks else learns).step()


def mean_apart(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> Tensor:
    each = [
        l1_loss(mine.flatten(1) / mine.flatten(1).norm(dim=1, keepdim=True), its.flatten(1) / its.flatten(1).norm(
            dim=1, keepdim=True), reduction="sum") / len(mine) / mine[0].numel() ** 0.5
        for mine, its in zip(found, wanted, strict=True)
    ]  # fmt: skip
    return torch.stack(each).sum()


def row(
    system: str, setting: str, trained: FakeQuantized, seed: int, scores: dict[str, float], began: float
) -> dict[str, Any]:
    weights = sum(math.prod(shape) for shape in trained.shapes().values())
    found = {
        "system": system, "model": "resnet", "setting": setting, "seed": seed, "bytes": trained.bytes,
        "bits_per_weight": round(8 * trained.bytes / weights, 3), "kl_novel": None, **scores,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    print(json.dumps(found), flush=True)
    return found


SYSTEMS = {"silq": silq, "mqat": mqat, "zaq": zaq}


def known() -> list[dict[str, Any]]:
    return json.loads(SUMMARY.read_text()) if SUMMARY.exists() else []


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    SUMMARY.parent.mkdir(parents=True, exist_ok=True)
    data = Data()
    for seed in options.seeds:
        for system in options.only:
            if not any(one["system"] == system and one["seed"] == seed for one in known()):
                found = list(SYSTEMS[system](data, seed))
                SUMMARY.write_text(json.dumps([*known(), *found], indent=1))
    write_page()


def write_page() -> None:
    """Write docs/results/qat.md."""
    rows = known()
    tables = []
    for system in SYSTEMS:
        settings = list(dict.fromkeys(one["setting"] for one in rows if one["system"] == system))
        lines = ["| setting | seeds | top-1 | KL from the original |", "|---|---:|---:|---:|"]
        for setting in settings:
            some = [one for one in rows if one["system"] == system and one["setting"] == setting]
            lines.append(
                f"| {setting} | {len(some)} | {spread([one['accuracy'] for one in some], '.1%')} | "
                f"{spread([one['kl_known'] for one in some], '.3f')} |"
            )
        tables.append("\n".join(lines))
    PAGE.write_text(_PAGE.format(*tables, steps=STEPS, batch=BATCH, tested=TESTED))


def spread(values: list[float], how: str) -> str:
    middle = format(mean(values), how)
    return middle if len(values) < 2 else f"{middle} ± {format(stdev(values), how)}"


_PAGE = """# Training with the rounding in the loop

Made by `python benchmarks/qat_study.py` on the reference's ResNet (CIFAR-10, top-1 of the original about 90 %): weights
of all stages with 2 bits in groups of 64 (2.4 bits stored), inputs of their convolutions with 4 bits and a trained
range. {steps} steps of {batch} images by Adam, minutes of one core; top-1 and divergence on {tested:,} test images that
no training sees.

## Steps of SiLQ (arXiv 2507.16933)
Claim: steps are calibrated, then learned (LSQ), and trained end to end by distillation. Each part on and off:

{0}

With seed 0, distillation has a quarter of the divergence that training by labels has, at the same top-1: confirmed.
Grids that are trained beside the weights change nothing here: not confirmed, in so few steps.

## Order of modules (MQAT, arXiv 2303.06753)
Claim: modules that are quantized and trained one after the other do better than all at once, and their order matters.
The same number of steps in all rows; stages of the network are the modules.

{1}

With seed 0, the order moves the divergence by a seventh, the last stage first being best: confirmed. All at once is
better than every order at the same number of steps: not confirmed.

## Without data (ZAQ, arXiv 2103.15263)
Claim: images of a generator that looks for where the quantized model and the original differ train it nearly as well as
real ones. Controls: no training, noise, real images.

{2}

With seed 0, the generator's images train better than noise, and worse than no training at all: not confirmed. The paper
trains for 18,000 steps of 256 images, from 6 bits.
"""


if __name__ == "__main__":
    main()
