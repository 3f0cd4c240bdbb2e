"""A mixture that is loaded: its checkpoints as models, its adjustments held by them, and its router."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moqa.errors import MoqaError
from moqa.format.adjustment import read_adjustment
from moqa.format.reader import open_checkpoint
from moqa.generation import load_any as load_one
from moqa.memory.mapped import drop
from moqa.mixture.features import read, seen_of
from moqa.mixture.merged import is_merged, load_merged
from moqa.mixture.record import ROUTER, MixtureRecord, check_router, is_mixture, read_mixture
from moqa.mixture.route import RoutedPrompt
from moqa.mixture.router import Router, restored
from moqa.mixture.steps import steps_with
from moqa.registry import check_known
from moqa.runtime.growing import round_cache
from moqa.runtime.load import load as load_checkpoint
from moqa.runtime.load import load_packed
from moqa.tasks import check_language_model, task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_T = TypeVar("_T")


@dataclass(frozen=True)
class Damage:
    """What happened to the files of a variant.

    Attributes:
        what: in words, after the variant's name.
        is_mapped: whether what was loaded can still be read: files were removed or replaced, and not written to.
    """

    what: str
    is_mapped: bool


class Mixture:
    """The variants of one original, of which each prompt gets one (`model.mixture`).

    >>> model, tokenizer = moqa.load("runs/mix")  # doctest: +SKIP
    >>> model.mixture.choose(tokenizer("Es war einmal").input_ids).variant  # doctest: +SKIP
    'german'

    All variants are mapped; memory is taken by those that compute, and given back by `rest`. One thread at a time may
    use a mixture.

    Args:
        folder: of the mixture.
        record: its manifest.
        models: checkpoint -> its model; adjustments are held by their names.
        router: its router.
    """

    def __init__(
        self, folder: Path, record: MixtureRecord, models: "dict[str, PreTrainedModel]", router: Router
    ) -> None:
        self.folder, self.record = folder, record
        self._models, self._router = models, router
        self._written = {name: _stamps(folder / name) for name in record.variants}
        self._awake: set[str] = set()  # checkpoints that were used since they rested
        self.current = record.default

    @property
    def models(self) -> "list[PreTrainedModel]":
        """Those of all checkpoints."""
        return list(self._models.values())

    @property
    def names(self) -> list[str]:
        """Names of all variants, also those that the router does not choose."""
        return list(self.record.variants)

    def choose(self, sample: Sequence[int] | Tensor) -> RoutedPrompt:
        """The variant for a prompt, from its tokens alone, or for an image.

        >>> pixels = processor(images=image, return_tensors="pt")["pixel_values"]  # doctest: +SKIP
        >>> route = model.mixture.choose(pixels[0])  # doctest: +SKIP
        >>> model.mixture.use(route.variant)(pixels).logits.shape  # doctest: +SKIP
        torch.Size([1, 10])

        Args:
            sample: tokens of the prompt; of more than 128, the last ones count. Or [channels, height, width] pixels.

        Raises:
            MoqaError: if there is no token, or it is no image.
        """
        router, record = self._router, self.record.router
        what = router.reads
        damage = None if what == "pixels" else self.damage(record.base)
        if damage is not None and not damage.is_mapped:
            return RoutedPrompt(self.record.default, problem=f"the router reads {record.base}, which {damage.what}")
        base = self.model_of(record.base) if what == "routing" else self._models[record.base]
        with torch.inference_mode():
            found = router.after(read(base, seen_of(sample, what), what))[0]
        confidence, index = (float(found.max()), int(found.argmax()))
        likeliest = record.choices[index]
        variant = likeliest if confidence >= record.threshold else self.record.default
        return RoutedPrompt(variant, confidence, likeliest)

    def checked(self, route: RoutedPrompt) -> RoutedPrompt:
        """The same route, or one to a variant that is intact: the default one, or else the one in use, or any.

        If none is, one whose files were only removed or replaced goes on: what was mapped of them stays.

        Raises:
            MoqaError: if none can be read.
        """
        damage = self.damage(route.variant)
        if damage is None:
            return route
        states = {name: self.damage(name) for name in (self.record.default, self.current, *self.names)}
        intact = [name for name, state in states.items() if state is None]
        mapped = [name for name in (route.variant, *states) if (state := states[name]) and state.is_mapped]
        if not intact and not mapped:
            raise MoqaError(f"{self.folder}: {route.variant} {damage.what}", "no variant can be read")
        other = (intact or mapped)[0]
        return RoutedPrompt(other, route.confidence, route.likeliest, f"{route.variant} {damage.what}")

    def damage(self, name: str) -> "Damage | None":
        """What happened to a variant's files since they were loaded; None if nothing."""
        found = None
        for one in (name, self.record.variants[name].of):
            for path, before in self._written[one].items() if one is not None else ():
                try:
                    now = _stamp(path)
                except OSError:
                    found = found or Damage(f"lacks {path.name}", is_mapped=True)
                    continue
                if now[:2] != before[:2]:
                    found = found or Damage(f"has another {path.name} than when it was loaded", is_mapped=True)
                elif now != before:
                    return Damage(f"has a {path.name} that was changed since it was loaded", is_mapped=False)
        return found

    def use(self, name: str) -> "PreTrainedModel":
        """The model of a variant, which computes with it from now on.

        Raises:
            MoqaError: if there is no variant of that name.
        """
        check_known("variant", name, self.names)
        self.current = name
        return self.model_of(name)

    def model_of(self, name: str) -> "PreTrainedModel":
        """The model that computes with a variant, switched to it."""
        of = self.record.variants[name].of
        model = self._models[of or name]
        self._awake.add(of or name)
        held: Any = getattr(model, "adjustments", None)
        if held is not None:
            held.switch(name if of else None)
        return model

    def steps(self, name: str, make: "Callable[[PreTrainedModel], Iterator[_T]]") -> Iterator[_T]:
        """What a model yields step by step, with a variant in use in each; others may be used between them."""
        return steps_with(self.use, name, make)

    def rest(self, names: Sequence[str]) -> None:
        """Give back the memory of all checkpoints but those of some variants; their next use reads them again."""
        busy = {self.record.variants[name].of or name for name in names}
        for name in self._awake - busy:
            drop(tensor for module in self._models[name].modules() for tensor in module.buffers(recurse=False))
        self._awake &= busy


def load(folder: str | Path, **options: Any) -> "tuple[PreTrainedModel, Any]":
    """Load a checkpoint, a mixture, or merged variants.

    >>> model, tokenizer = moqa.load("runs/out")
    >>> output = model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=8)
    >>> text = tokenizer.decode(output[0])

    Weights are mapped from the files, not copied: units stay packed, and embeddings stay in their stored dtype. Of a
    mixture, the model of its best single variant is returned, with all others in `model.mixture`: `moqa.generate`
    chooses among them for each prompt, and `model.mixture.use(name)` returns the model of one of them.

    Args:
        folder: of the checkpoint, mixture or merged variants, or the Hub id of a checkpoint.
        options: of `moqa.runtime.load.load`: `verify`, `dtype`, `kernels`, `device`, `width`; of merged variants,
            `verify`.

    Returns:
        A transformers model whose units are packed, and its tokenizer or image processor.

    Raises:
        MoqaError: if a file is damaged or does not fit the others, or the kernels do not run here.
    """
    several = is_mixture(folder) or is_merged(folder)
    if several and (width := options.pop("width", None)) is not None:
        raise MoqaError(f"{folder} is a mixture", f"width {width} needs a checkpoint")
    if is_merged(folder):
        return load_merged(folder, **options)
    if not several:
        return load_checkpoint(folder, **options)
    mixture = open_mixture(folder, **options)
    model: Any = mixture.use(mixture.record.default)
    return model, task_of(model.config).processor(mixture.folder / mixture.record.router.base)


def load_any(
    model: str | Path,
    adjustment: str | Path | None = None,
    lora: str | Path | None = None,
    kv_bits: int | None = None,
    width: int | None = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a mixture, a checkpoint or an original model that writes text; see `moqa.generation.load_any`.

    >>> model, tokenizer = load_any("runs/out")

    Raises:
        MoqaError: as there, or if a mixture is to compute with an adjustment, a LoRA or at a width.
    """
    if not is_mixture(model) and not is_merged(model):
        return load_one(model, adjustment, lora, kv_bits, width)
    for what, given in (("an adjustment", adjustment), ("a LoRA", lora), ("a width", width)):
        if given is not None:
            raise MoqaError(f"{model} is a mixture", f"{what} such as {given} needs a checkpoint")
    loaded, tokenizer = load(model)
    check_language_model(loaded.config, model)
    mixture: Any = loaded.mixture
    for one in mixture.models:
        round_cache(one, kv_bits)
    return loaded, tokenizer


def open_mixture(folder: str | Path, *, verify: bool = True, **options: Any) -> Mixture:
    """Load a mixture; every model of it has it as `model.mixture`.

    Args:
        folder: of the mixture.
        verify: compare the files' hashes first.
        options: of `moqa.runtime.load.load_packed`: `dtype`, `kernels`, `device`.

    Raises:
        MoqaError: if a variant or the router is missing or damaged, or belongs to another mixture.
    """
    folder = Path(folder)
    record = read_mixture(folder)
    check_router(folder, record)
    models: dict[str, Any] = {}
    for name in record.checkpoints:
        packed = open_checkpoint(folder / name, verify)
        _check(folder, name, packed.manifest.checksum, record)
        models[name] = load_packed(packed, **options)
    for name, variant in record.variants.items():
        if variant.of is not None:
            adjustment = read_adjustment(folder / name)
            _check(folder, name, adjustment.record.checksum, record)
            models[variant.of].adjustments.hold(adjustment, name)
    try:
        tensors = load_file(folder / ROUTER)
    except (SafetensorError, OSError) as error:
        raise MoqaError(f"{folder / ROUTER} cannot be read", str(error)) from None
    router = restored(record.router.kind, record.router.features, len(record.router.choices), tensors)
    mixture = Mixture(folder, record, models, router)
    for model in models.values():
        model.mixture = mixture
    return mixture


def _check(folder: Path, name: str, found: str, record: MixtureRecord) -> None:
    if found != record.variants[name].checksum:
        raise MoqaError(
            f"{folder / name} is not the variant that the router was trained for ({found[:8]})",
            f"the mixture was made with {record.variants[name].checksum[:8]}",
        )


def _stamps(folder: Path) -> dict[Path, tuple[int, ...]]:
    return {path: _stamp(path) for path in sorted(folder.rglob("*.safetensors"))}


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
