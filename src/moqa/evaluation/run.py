"""`moqa.evaluate`: perplexity and divergence of a model or checkpoint on held-out text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field
from torch import nn

from moqa.data import Data, Source, refuse_overlap
from moqa.errors import MoqaError
from moqa.evaluation.imported import folder_of
from moqa.evaluation.measure import Quality, Reference, scores
from moqa.format.adjustment import read_adjustment
from moqa.format.cache import has_cache, open_cache
from moqa.format.manifest import Fitted
from moqa.format.reader import Checkpoint, is_checkpoint, open_checkpoint
from moqa.integrations.lora import add_lora
from moqa.models.gguf_reader import GgufReader
from moqa.models.load import read_config
from moqa.models.stored import imported_format, open_stored, stored_files
from moqa.models.view import ModelView, open_model
from moqa.originals import folder as original
from moqa.originals.fingerprint import differing_part
from moqa.planning.registry import STRATEGIES
from moqa.progress import Report, quiet
from moqa.reduction.record import read_reduction
from moqa.runtime.load import load_packed
from moqa.storage.paths import found
from moqa.tasks import Samples, task_of

DEFAULT_WINDOWS = 64


class Evaluation(BaseModel, frozen=True):
    """The output of `moqa evaluate --json`."""

    model: str = Field(description="as the user gave it")
    against: str | None = Field(description="the original that the divergence is measured from")
    strategy: Annotated[str, AfterValidator(STRATEGIES.current)] | None = Field(
        None, description="of the checkpoint; None for an original model"
    )
    format: str | None = Field(None, description="in which another tool has quantized the model; None for moqa's")
    method: str | None = None
    hedge: float | None = None
    fitted_on: tuple[str, ...] = Field((), description="distributions that the checkpoint was fitted on")
    bytes: int = Field(description="all weight files")
    bits_per_weight: float = Field(description="stored bits per weight of the units")
    model_bits_per_weight: float = Field(description="stored bits per weight of the whole model")
    cache_bytes: int = Field(0, description="of the original's channels that the checkpoint keeps")
    adjustment: str | None = Field(None, description="as the user gave it")
    lora: str | None = Field(None, description="folder of a LoRA, as the user gave it")
    width: int | None = Field(None, description="of a checkpoint with nested widths, as the user gave it")
    adjustment_bytes: int = Field(0, description="by which the weights in use grow with the adjustment")
    context: int
    distributions: dict[str, Quality]


def evaluate(
    model: str | Path,
    data: Data,
    *,
    against: str | Path | None = None,
    context: int = 256,
    windows: int | None = DEFAULT_WINDOWS,
    report: Report = quiet,
    reference: Reference | None = None,
    kernels: str = "reference",
    adjustment: str | Path | None = None,
    lora: str | Path | None = None,
    width: int | None = None,
) -> Evaluation:
    """Measure a model or checkpoint on held-out text, from what is on disk.

    >>> evaluation = moqa.evaluate("runs/out", {"wiki": "wiki.test.txt"}, windows=2)
    >>> evaluation.distributions["wiki"].kl_divergence > 0
    True

    Args:
        model: folder of an original model or of a checkpoint, or a Hub id; also of a model that another tool has
            quantized (GPTQ, AWQ, compressed-tensors), or a GGUF file, which `against` belongs to.
        data: held-out texts, as distributions or name -> source; those that the checkpoint was fitted on are refused.
        against: the original to compare with; None compares an original with itself, and a checkpoint with the model
            that it was made from, if that still exists.
        context: tokens in a window.
        windows: number per distribution, evenly spaced; None takes all of the text.
        report: called with the name of a step, how much of it is done, and its total.
        reference: the original's outputs on windows of these distributions, if they are already known.
        kernels: that a checkpoint computes with (`moqa.load`); the reference adds no rounding of activations.
        adjustment: folder of an adjustment to apply to the checkpoint.
        lora: folder of a LoRA that the checkpoint computes with; what it was trained on is not known here.
        width: of a checkpoint with nested widths, see `moqa.load`.

    Raises:
        MoqaError: if something is missing or damaged, or a text overlaps those that the checkpoint was fitted on.
    """
    with folder_of(model, against) as folder:
        return _evaluated(
            folder, model, data, against=against, context=context, windows=windows, report=report, reference=reference,
            kernels=kernels, adjustment=adjustment, lora=lora, width=width,
        )  # fmt: skip


def _evaluated(
    folder: Path,
    model: str | Path,
    data: Data,
    *,
    against: str | Path | None,
    context: int,
    windows: int | None,
    report: Report,
    reference: Reference | None,
    kernels: str,
    adjustment: str | Path | None,
    lora: str | Path | None,
    width: int | None,
) -> Evaluation:
    packed = open_checkpoint(folder, width=width) if is_checkpoint(folder) else None
    adjusted = None if adjustment is None else read_adjustment(adjustment)
    if adjusted and not packed:
        raise MoqaError(f"{model} is not a checkpoint", f"an adjustment such as {adjustment} needs one")
    if lora is not None and not packed:
        raise MoqaError(f"{model} is not a checkpoint", f"a LoRA such as {lora} needs one")
    if width is not None and not packed:
        raise MoqaError(f"{model} is not a checkpoint", f"--width {width} needs one")
    folder = folder if packed else original.locate(folder)
    config = read_config(folder, packed=packed is not None, imported=True)
    task = task_of(config)
    if not task.is_chain:
        raise MoqaError(f"{model} is a {task.kind}", "moqa vla rollout shows what it does")
    reader = task.reader(folder)
    distributions = task.sources(data, reader)
    if not distributions:
        raise MoqaError("no distribution to evaluate on", "give at least one --data NAME=FILE")
    cut = reference.windows if reference else [task.cut(d, reader, context, windows) for d in distributions]
    if [w.name for w in cut] != [d.name for d in distributions]:
        raise ValueError("the reference was made for other distributions")
    if packed:
        refuse_fitted(str(packed.folder), packed.manifest.fitted, distributions, cut)
    elif reduced := read_reduction(folder):
        refuse_fitted(str(model), reduced.fitted, distributions, cut)
    if adjusted:
        refuse_fitted(str(adjusted.folder), adjusted.record.fitted, distributions, cut)
    view = None if packed else open_model(folder, imported=True)
    foreign = None if packed else imported_format(folder)
    if foreign and against is not None:
        _check_same_words(model, config, against)
    module: Any = load_packed(packed, kernels=kernels) if packed else view.model  # type: ignore[union-attr]
    if lora is not None:
        add_lora(module, lora)
    if adjusted:
        module.apply(adjusted)
    if reference is None:
        # what another tool has quantized says nothing of its original
        reference = None if foreign and against is None else _reference(model, against, packed, module, cut, report)
    result = scores(module, cut, reference, report)
    size = _size_of_checkpoint(packed) if packed else _size_of_original(folder, view)
    name = str(against) if against is not None else (packed.manifest.model if packed else str(model))
    return Evaluation(
        model=str(model), against=name if reference else None, **size, context=task.context(context),
        format=foreign, adjustment=None if adjustment is None else str(adjustment),
        lora=None if lora is None else str(lora), width=width,
        adjustment_bytes=adjusted.record.extra_bytes if adjusted else 0,
        distributions={name: _rounded(quality) for name, quality in result.items()},
    )  # fmt: skip


def evaluate_original(model: str, view: ModelView, reference: Reference, context: int, report: Report) -> Evaluation:
    """Measure an original from its own outputs, which are known already.

    Args:
        model: as the user gave it.
        view: the original, opened from a folder.
        reference: its outputs on held-out windows.
        context: tokens in a window.
        report: called per layer.
    """
    assert view.folder is not None
    found = scores(reference.model, reference.windows, reference, report)
    return Evaluation(
        model=model, against=model, **_size_of_original(view.folder, view), context=view.task.context(context),
        distributions={name: _rounded(quality) for name, quality in found.items()},
    )  # fmt: skip


def refuse_fitted(
    what: str, fitted: Mapping[str, Fitted], distributions: Sequence[Source], cut: Sequence[Samples]
) -> None:
    """Refuse held-out texts that something was fitted on, as a whole or in passages.

    Args:
        what: was fitted, for the message.
        fitted: the texts that it was fitted on.
        distributions: the held-out texts.
        cut: the samples of each that are measured.

    Raises:
        MoqaError: naming the text.
    """
    for distribution, windows in zip(distributions, cut, strict=True):
        same = [name for name, text in fitted.items() if text.digest == distribution.digest]
        if same:
            raise MoqaError(
                f"{distribution.name}={distribution.origin} is the text that {what} was fitted on ({same[0]})",
                "evaluate on held-out text",
            )
        refuse_overlap(distribution.name, windows.hashes, {name: text.hashes() for name, text in fitted.items()})


def _reference(
    model: str | Path,
    against: str | Path | None,
    packed: Checkpoint | None,
    module: nn.Module,
    cut: list[Samples],
    report: Report,
) -> Reference | None:
    if against is None and packed is None:
        return Reference.of(module, cut, report)
    wanted = against if against is not None else found(packed.manifest.model, packed.folder) if packed else model
    if against is None and not Path(wanted).is_dir():
        return None
    folder = original.locate(wanted)
    other = packed and differing_part(folder, packed.manifest.fingerprint)
    if other:
        reason = f"it has other {other}"
        raise MoqaError(f"--against {wanted} is not the model that {model} was made from", f"{reason}: give that model")
    return Reference.of(open_model(folder).model, cut, report)


def _check_same_words(model: str | Path, config: Any, against: str | Path) -> None:
    theirs = read_config(original.locate(against))
    if (config.model_type, config.vocab_size) != (theirs.model_type, theirs.vocab_size):
        raise MoqaError(
            f"--against {against} is a {theirs.model_type} of {theirs.vocab_size} tokens",
            f"{model} is a {config.model_type} of {config.vocab_size}: give its original",
        )


def _size_of_checkpoint(packed: Checkpoint) -> dict:
    manifest = packed.manifest
    hedge = manifest.options.get("hedge")
    return {
        "strategy": manifest.strategy,
        "method": manifest.method,
        "hedge": None if hedge is None else float(hedge),
        "fitted_on": tuple(manifest.fitted),
        "bytes": packed.bytes,
        "cache_bytes": open_cache(packed.folder, manifest.fingerprint).bytes if has_cache(packed.folder) else 0,
        "bits_per_weight": packed.bits_per_weight,
        "model_bits_per_weight": packed.model_bits_per_weight,
    }


def _size_of_original(folder: Path, view: ModelView | None) -> dict:
    assert view is not None
    size = sum(path.stat().st_size for path in stored_files(folder))
    _, stored = open_stored(folder, imported=True)
    units = sum(unit.weights for unit in view.units.values())
    if isinstance(stored, GgufReader):
        unit_bytes = stored.unit_bytes
    else:
        unit_bytes = size - sum(t.numel() * t.element_size() for t in view.kept_on_disk().values())
    # headers are counted as bytes of units: plain weights are known to have a whole number of bits
    bits = round(unit_bytes * 8 / units, 0 if stored.is_plain else 2)
    return {"bytes": size, "bits_per_weight": bits, "model_bits_per_weight": size * 8 / stored.values}


def _rounded(quality: Quality) -> Quality:
    digits = {name: float(f"{value:.8g}") for name, value in quality if isinstance(value, float)}
    return quality.model_copy(update=digits)
