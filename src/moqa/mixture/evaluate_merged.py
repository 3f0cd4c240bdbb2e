"""`moqa.evaluate` of merged variants: each beside the model that it was, and beside the base in its place."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, Field

from moqa.data import Data
from moqa.errors import MoqaError
from moqa.evaluation.measure import Quality, Reference, scores
from moqa.evaluation.run import DEFAULT_WINDOWS
from moqa.mixture.merged import BASE, MergedVariant, load_merged
from moqa.models.view import open_model
from moqa.originals import folder as original
from moqa.originals.fingerprint import differing_part
from moqa.progress import Report, quiet
from moqa.storage.paths import found
from moqa.tasks import task_of


class MergedRow(BaseModel, frozen=True):
    """A merged variant on one distribution; divergences are from the variant's own model."""

    variant: str
    distribution: str
    own: Quality = Field(description="of the model that was merged")
    merged: Quality
    base: Quality = Field(description="of the base in the variant's place")


class MergedEvaluation(BaseModel, frozen=True):
    """The output of `moqa evaluate --json` for merged variants."""

    merged: str = Field(description="as the user gave it")
    bytes: int = Field(description="all weight files")
    apart: int = Field(description="the weight files of the variants' own models")
    context: int
    rows: tuple[MergedRow, ...]


def evaluate_merged(
    merged: str | Path,
    data: Data,
    *,
    context: int = 256,
    windows: int | None = DEFAULT_WINDOWS,
    report: Report = quiet,
) -> MergedEvaluation:
    """Measure merged variants on held-out text, each from the model that it was, which must still exist.

    >>> found = evaluate_merged("runs/merged", {"math": "math.test.txt"})  # doctest: +SKIP
    >>> found.rows[0].merged.kl_divergence < found.rows[0].base.kl_divergence  # doctest: +SKIP
    True

    Args:
        merged: folder of the merged variants.
        data: held-out texts.
        context: tokens in a window.
        windows: per distribution; None for all.
        report: called with the progress.

    Raises:
        MoqaError: if something is missing or damaged, or a variant's own model is another one now.
    """
    folder = Path(merged)
    model, reader = load_merged(folder)
    task = task_of(model.config)
    texts = task.sources(data, reader)
    if not texts:
        raise MoqaError("no distribution to evaluate on", "give at least one --data NAME=FILE")
    cut = [task.cut(text, reader, context, windows) for text in texts]
    record = model.mixture.record
    models = {name: _own_model(folder, name, variant) for name, variant in record.variants.items()}

    def rows() -> Iterator[MergedRow]:
        for name, where in models.items():
            reference = Reference.of(open_model(where).model, list(cut), report)
            own = scores(reference.model, cut, reference, report)
            # one model in memory, whose weights are rewritten
            kept, base = (scores(model.mixture.use(which), cut, reference, report) for which in (name, BASE))
            for text in (one.name for one in cut):
                yield MergedRow(variant=name, distribution=text, own=own[text], merged=kept[text], base=base[text])

    return MergedEvaluation(
        merged=str(merged), bytes=record.account.total, apart=record.account.apart, context=task.context(context),
        rows=tuple(rows()),
    )  # fmt: skip


def _own_model(folder: Path, name: str, variant: MergedVariant) -> Path:
    where = original.locate(found(variant.model, folder))
    other = differing_part(where, variant.fingerprint)
    if other:
        raise MoqaError(f"{where} is not the model that became variant {name} of {folder}", f"it has other {other}")
    return where
