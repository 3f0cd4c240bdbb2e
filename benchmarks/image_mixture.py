"""A part of `mixture_study.py`: checkpoints of the reference's ResNet as variants, and a router that sees the image.

Reads the images of recipes/cifar10.py (`python recipes/cifar10.py -o runs/cifar10`), of which no original was trained
on those in test.safetensors; the slice in reference/image/test is held out from everything here.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from demo import ROOT
from mixture_cases import RUNS, Case, Study, json_kept, say, sizes_of
from PIL import Image
from qat_study import KEEP, distilled, optimizer_of, original, set_rates
from safetensors.torch import load_file
from timing import take_turns
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

import moqa
from moqa.data import Images, read_images
from moqa.format.grid import ZERO_STEPS, Grid
from moqa.format.planes import pack
from moqa.format.scheme import Scheme
from moqa.methods.registry import METHODS, Method
from moqa.mixture.features import read
from moqa.mixture.load import open_mixture
from moqa.mixture.record import is_mixture
from moqa.mixture.router import Router
from moqa.mixture.variants import CheckpointVariant, Spec
from moqa.models.view import ModelView, open_model
from moqa.qat import prepare

MODEL, TEST, CIFAR = (
    ROOT / "reference" / "image" / "model",
    ROOT / "reference" / "image" / "test",
    ROOT / "runs" / "cifar10",
)
FILES, SPENT_ON_IMAGES = RUNS / "images", RUNS / "latency-images.json"
KNOWN, NOVEL = ("clean", "noise"), ("blur", "dark")
EACH, SAMPLES, TESTED = 3000, 600, 500  # images of a known kind, of them for the router; of each kind held out
GROUP = 256  # weights that share a scale, as far as a method fits one to each group
STEPS, BATCH = 100, 32
PERCENTILE = 0.001


def changed(images: Tensor, kind: str, seed: int) -> Tensor:
    """uint8 [n, 32, 32, 3] images of a kind."""
    values, draw = images.float(), torch.Generator().manual_seed(seed)
    if kind == "noise":
        values = values + 20 * torch.randn(values.shape, generator=draw)
    elif kind == "blur":
        framed = pad(values.permute(0, 3, 1, 2), (1, 1, 1, 1), mode="replicate")
        values = avg_pool2d(framed, 3, stride=1).permute(0, 2, 3, 1)
    elif kind == "dark":
        values = 0.35 * values
    return values.round().clamp(0, 255).byte()


def sources() -> tuple[list[Images], list[Images]]:
    """Known images to build from, and held-out ones of all kinds, as folders by class."""
    stored = load_file(CIFAR / "test.safetensors")
    out = [int(path.stem) for path in TEST.rglob("*.png")]
    rest = sorted(set(range(len(stored["labels"]))) - set(out))
    parts = {("build", kind): rest[n * EACH : (n + 1) * EACH] for n, kind in enumerate(KNOWN)}
    parts |= {("test", kind): sorted(out) for kind in (*KNOWN, *NOVEL)}
    names = sorted(path.name for path in TEST.iterdir())
    for number, ((use, kind), chosen) in enumerate(parts.items()):
        folder = FILES / use / kind
        if not folder.is_dir():
            for name in names:
                (folder / name).mkdir(parents=True)
            pixels = changed(stored["images"][chosen], kind, number)
            for index, image, label in zip(chosen, pixels, stored["labels"][chosen].tolist(), strict=True):
                Image.fromarray(image.numpy()).save(folder / names[label] / f"{index:05}.png")
    return tuple(  # type: ignore[return-value]
        [read_images(f"{kind}={FILES / use / kind}") for use, kind in parts if use == wanted]
        for wanted in ("build", "test")
    )


def on_range(ends: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[Tensor, Scheme], dict[str, Tensor]]:
    """Rounding on grids between the ends that [out, in] weights get; each is stored as often as there are groups."""

    def store(weights: Tensor, scheme: Scheme) -> dict[str, Tensor]:
        low, high = (end.expand(len(weights), 1) for end in ends(weights.float()))
        groups, top = -(-weights.shape[1] // scheme.group_size), torch.tensor(2.0**scheme.width - 1)
        scale = ((high - low) / top).bfloat16().expand(-1, groups).contiguous()
        zero = (-low / (high - low) * ZERO_STEPS).round().clamp(0, ZERO_STEPS).byte().expand(-1, groups).contiguous()
        grid = Grid(scale, zero, scheme.group_size, top.expand(scale.shape))
        return grid.stored(pack(grid.encode(weights.float()), scheme.width))

    return store


def percentiles(weights: Tensor) -> tuple[Tensor, Tensor]:
    ends = torch.tensor([PERCENTILE, 1 - PERCENTILE])
    low, high = weights.quantile(ends, dim=1, keepdim=True)
    return low.clamp(max=0), high.clamp(min=0)


RANGES = {
    "per-tensor": lambda w: (w.min().clamp(max=0), w.max().clamp(min=0)),
    "per-channel": lambda w: (w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)),
    "percentile": percentiles,
}


def register(name: str, store: Callable[[Tensor, Scheme], dict[str, Tensor]]) -> None:
    METHODS[name] = Method(name, run=lambda _: None, store=store)  # type: ignore[arg-type, return-value]


def digest(weights: Tensor) -> str:
    return hashlib.sha256(weights.float().contiguous().numpy().tobytes()).hexdigest()


def trained(width: int, known: list[Images], view: ModelView) -> Callable[[Tensor, Scheme], dict[str, Tensor]]:
    """Weights of a model that was trained with its rounding (`moqa.qat`) to answer as the original, by weight."""
    reader = view.task.reader(MODEL)
    parts = [view.task.cut(view.task.split(source)[0], reader, 1).inputs for source in known]
    images = torch.cat(parts)
    torch.manual_seed(0)
    model, teacher = original(), original()
    learner = prepare(model, Scheme(width=width, group_size=GROUP), keep=KEEP)
    optimizer = optimizer_of(model)
    for step, batch in enumerate(batches(images)):
        set_rates(optimizer, step / STEPS)
        with torch.no_grad():
            wanted = teacher(pixel_values=batch).logits
        optimizer.zero_grad()
        distilled(model(pixel_values=batch).logits, wanted).backward()
        optimizer.step()
    found = dict[str, dict[str, Tensor]]()
    for name, tensor in learner.stored().items():
        weight, _, suffix = name.rpartition(".")
        found.setdefault(digest(view.weight(view.units[weight.removesuffix(".weight")])), {})[suffix] = tensor
    return lambda weights, _: found[digest(weights)]


def batches(images: Tensor) -> Iterator[Tensor]:
    for _ in range(STEPS):
        yield images[torch.randint(len(images), (BATCH,))]


def variants(width: int) -> dict[str, Spec]:
    """Checkpoints of equal bytes."""
    methods = ("per-channel", "percentile", "gptq", "trained", "per-tensor")
    return {
        name: CheckpointVariant(strategy="uniform", widths=(width,), groups=(GROUP,), method=name) for name in methods
    }


def images(summary: Any, width: int) -> None:
    """All ways to answer images with checkpoints of a width."""
    known, held_out = sources()
    study = Study(summary.rows, MODEL, held_out, TESTED, prompt=0)
    out, specs, measured = RUNS / f"images-{width}", variants(width), RUNS / "measured-images"
    for name, ends in RANGES.items():
        register(name, on_range(ends))
    if not is_mixture(out):
        say(f"training at {width} bits")
        register("trained", trained(width, known, open_model(MODEL)))
        say(f"{out.name}: {', '.join(specs)}")
        moqa.build_mixture(MODEL, known, out, variants=specs, samples=SAMPLES, profile_samples=256, measured=measured)
    case = study.case(out, list(specs), known, SAMPLES, measured)
    about = {
        "model": "ResNet", "bits": width, **sizes_of(out),
        "roles": {kind: "known" if kind in KNOWN else "novel" for kind in (*KNOWN, *NOVEL)},
    }  # fmt: skip
    routers = {}
    for count in range(2, len(case.names) + 1):
        routers = study.ways(case, about, count, [("se-resnet", "divergence")])
    summary.spent |= json_kept(SPENT_ON_IMAGES, lambda: latency(case, routers["se-resnet"]))


def latency(case: Case, router: Router) -> dict[str, Any]:
    """Median microseconds of a route and of an answer, for one image and for 32."""
    mixture = open_mixture(case.folder)
    model, found = mixture.use(case.names[0]), {}
    for count in (1, 32):
        pixels = case.test[0].inputs[:count]

        @torch.inference_mode()
        def route(_: int, pixels: Tensor = pixels) -> Tensor:
            return router.after(read(model, pixels, "pixels"))

        @torch.inference_mode()
        def answer(_: int, pixels: Tensor = pixels) -> Tensor:
            return model(pixels).logits

        found[f"{count} image{'s' * (count > 1)}"] = take_turns({"se-resnet": route, "answer": answer}, rounds=15)
    return found
