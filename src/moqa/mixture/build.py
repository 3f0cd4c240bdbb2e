"""`moqa.build_mixture`: make variants, measure them, train a router, and write one folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moqa import __version__
from moqa.data import Data, Windows, refuse_overlap
from moqa.errors import MoqaError
from moqa.memory.limit import MemoryLimit
from moqa.mixture.finish import MeasuredVariants
from moqa.mixture.losses import LossStore
from moqa.mixture.make import MadeFrom, check_made, make_variant, share_files
from moqa.mixture.measure import LOSSES
from moqa.mixture.record import MixtureRecord, read_mixture
from moqa.mixture.router import ROUTERS_OF, router_of
from moqa.mixture.variants import (
    AUTO,
    CheckpointVariant,
    Spec,
    check_variants,
    of_checkpoint,
    proposed,
    read_variants,
)
from moqa.models.load import read_config
from moqa.models.view import open_model
from moqa.originals import folder as original
from moqa.originals.fingerprint import fingerprint
from moqa.profiling import profile
from moqa.progress import Report, quiet
from moqa.registry import check_known
from moqa.storage.folders import check_free
from moqa.storage.paths import recorded
from moqa.storage.resumable import as_json, resumable, tidy
from moqa.tasks import Samples, task_of

# of each distribution for the router: windows of so many tokens, or images
DEFAULT_SAMPLES, DEFAULT_IMAGES, CONTEXT = 64, 1024, 256


@dataclass(frozen=True)
class BuiltMixture:
    """The result of `moqa mixture build`.

    Attributes:
        folder: of the mixture.
        record: its manifest.
    """

    folder: Path
    record: MixtureRecord


def build_mixture(
    model: str | Path,
    data: Data,
    out: str | Path,
    *,
    variants: str | Path | Mapping[str, Spec] = AUTO,
    budget: str | None = None,
    router: str | None = None,
    labels: str = LOSSES[0],
    samples: int | None = None,
    profile_samples: int = 64,
    measured: str | Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
    restart: bool = False,
    report: Report = quiet,
    memory: MemoryLimit | None = None,
) -> BuiltMixture:
    """Make several variants of a model and a router that chooses one for each prompt, or each image.

    >>> texts = {"wiki": "wiki.txt", "novels": "novels.txt"}
    >>> mixture = moqa.build_mixture("reference/model", texts, "runs/mix", budget="3bpw")  # doctest: +SKIP
    >>> mixture.record.router.choices  # doctest: +SKIP
    ('base', 'wiki', 'novels')

    Of each distribution, four fifths are for the variants and one for the router, of which a quarter is held out from
    it. The label of a prompt is the variant with the least loss on what follows it, that of an image the one with the
    least loss.

    Args:
        model: folder or Hub id of the original.
        data: distributions, as for `moqa.profile`; never the held-out text of an evaluation.
        out: folder to make.
        variants: a YAML file (`moqa.mixture.variants`), the same as objects, or `auto`, which is for texts.
        budget: of checkpoints that have none of their own, such as 3bpw.
        router: `linear`, `encoder` or `histogram`, of images `se-resnet`; None means the first of them.
        labels: `divergence` from the original, or `likelihood` of the text, or of the image's class.
        samples: of each distribution for the router: windows of 256 tokens (None: 64), or images (None: 1024).
        profile_samples: windows, or images, of each distribution for the profile.
        measured: folder of the profile and the losses of variants, which are used again; None means beside `out`.
        seed: of samples and of the router.
        overwrite: replace a mixture that exists at `out`.
        restart: discard what an earlier run has finished.
        report: called with the progress.
        memory: what quantizing may use; None means all free memory.

    Raises:
        MoqaError: if a variant, a text or the model cannot be used, variants are of different models, or `out` exists.
    """
    out = Path(out)
    check_known("--labels", labels, LOSSES)
    check_free(out, overwrite)
    folder = original.locate(model)
    task = task_of(read_config(folder), folder)
    if task.name not in ROUTERS_OF:
        raise MoqaError(f"{model} is a {task.kind}", "give a causal language model or an image classifier")
    router = router_of(task, router)
    samples = samples or (DEFAULT_SAMPLES if task.predicts_each else DEFAULT_IMAGES)
    reader = task.reader(folder)
    sources = task.sources(data, reader)
    names = [source.name for source in sources]
    specs = dict(_specs(variants, names))
    check_variants(specs, names, budget, task)
    pairs = {source.name: task.split(source) for source in sources}
    windows = [task.cut(pairs[name][1], reader, CONTEXT, samples, seed) for name in names]
    _check_enough(windows)
    of = {name: of_checkpoint(name, specs) for name in specs}
    of = dict(sorted(of.items(), key=lambda pair: pair[0] != pair[1]))  # adjustments after their checkpoints
    job = as_json({
        "moqa": __version__, "model": fingerprint(folder), "budget": budget, "router": router, "labels": labels,
        "variants": {name: spec.model_dump(mode="json") for name, spec in specs.items()},
        "texts": {source.name: source.digest for source in sources}, "samples": samples, "profile": profile_samples,
        "seed": seed,
    })  # fmt: skip
    if tidy(out) == job:
        return BuiltMixture(out, read_mixture(out))
    check_free(out, overwrite)
    kept = out.with_name(f"{out.name}.measured") if measured is None else Path(measured)
    view = open_model(folder)
    known = _known(specs, names)
    profiled = None
    if known:
        profiled = profile(
            model, [pairs[name][0] for name in known], kept / "profile", samples=profile_samples, seed=seed,
            report=report, view=view, memory=memory, restart=restart,
        )  # fmt: skip
    source = MadeFrom(str(model), view, profiled, {n: fit for n, (fit, _) in pairs.items()}, budget, memory, seed)
    with resumable(out, job, overwrite, restart) as work:
        for name in of:
            if work.done(f"made-{name}") is None:
                make_variant(name, specs, source, work, report)
                work.mark_done(f"made-{name}", {})
            _check_variant(name, specs, work.result, windows, job["model"])
        shared = share_files(work.result, list(of))
        losses = LossStore(kept / "losses", windows).all(work.result, of, view, report)
        made = MeasuredVariants(work.result, of, windows, sources, losses, shared, recorded(model, out))
        made.finish(router, labels, seed, report)
    return BuiltMixture(out, read_mixture(out))


def _check_variant(
    name: str, specs: Mapping[str, Spec], folder: Path, windows: Sequence[Samples], prints: str
) -> None:  # fmt: skip
    """Refuse a variant of another model, or one that was fitted on the router's windows."""
    fitted = check_made(name, specs, folder, prints)
    for cut in windows:
        refuse_overlap(cut.name, cut.hashes, {text: found.hashes() for text, found in fitted.items()})


def _specs(variants: str | Path | Mapping[str, Spec], names: Sequence[str]) -> Mapping[str, Spec]:
    if isinstance(variants, Mapping):
        return variants
    return proposed(names) if str(variants) == AUTO else read_variants(variants)


def _known(specs: Mapping[str, Spec], names: Sequence[str]) -> list[str]:
    """Distributions that a checkpoint is fitted on."""
    planned = [spec for spec in specs.values() if isinstance(spec, CheckpointVariant) and spec.plan is None]
    wanted = {name for spec in planned for name in spec.known or names}
    return [name for name in names if name in wanted]


def _check_enough(windows: Sequence[Samples]) -> None:
    few = next((cut for cut in windows if len(cut.inputs) < 2), None)
    if few is not None:
        one, more = (f"window of {CONTEXT} tokens", "text") if isinstance(few, Windows) else ("image", "images")
        raise MoqaError(f"the router's fifth of {few.name} has one {one}", f"give more {more}")
