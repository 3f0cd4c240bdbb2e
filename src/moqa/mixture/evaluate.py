"""`moqa.evaluate` of a mixture: what its router gets out of it, beside every variant, chance and the best choice."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from moqa.data import Data
from moqa.errors import MoqaError
from moqa.evaluation.measure import Reference
from moqa.evaluation.run import DEFAULT_WINDOWS, refuse_fitted
from moqa.format.adjustment import read_adjustment
from moqa.format.manifest import Fitted
from moqa.format.reader import read_checkpoint
from moqa.mixture.load import Mixture, open_mixture
from moqa.mixture.measure import TokenLosses, token_losses
from moqa.mixture.record import MixtureRecord
from moqa.models.load import read_config
from moqa.models.view import open_model
from moqa.originals import folder as original
from moqa.originals.fingerprint import differing_part
from moqa.progress import Report, quiet
from moqa.storage.paths import found
from moqa.tasks import Samples, task_of

Kind = Literal["variant", "best-single", "uniform-routing", "router", "oracle"]
DEFAULT_PROMPT, CONTEXT = 64, 256


class MixtureQuality(BaseModel, frozen=True):
    """Quality of one way to answer, on the continuations of one distribution's prompts, or on its images."""

    kl_divergence: float = Field(description="mean of KL(original || answer) per token or image, nats")
    interval: float = Field(description="half of the 95 % interval of that mean, over prompts or images")
    perplexity: float = Field(description="exponential of the mean negative log-likelihood of a token, or of a label")
    top1_agreement: float = Field(description="share of tokens, or images, where both rank the same first")


class MixtureRow(BaseModel, frozen=True):
    """One way to answer prompts or images: a variant, or a way to choose among them."""

    kind: Kind
    name: str
    distributions: dict[str, MixtureQuality]


class MixtureEvaluation(BaseModel, frozen=True):
    """The output of `moqa evaluate --json` for a mixture."""

    mixture: str = Field(description="as the user gave it")
    against: str = Field(description="the original")
    bytes_total: int
    bytes_resident: int
    context: int
    prompt: int = Field(description="tokens that the router sees of each window; those after it are scored; 0: images")
    prompts: dict[str, int] = Field(description="by distribution; of images, their number")
    usage: dict[str, dict[str, float]] = Field(description="by distribution: share of its prompts that a variant gets")
    confidence: dict[str, float] = Field(description="by distribution: mean confidence of the router")
    rows: tuple[MixtureRow, ...]

    def row(self, kind: Kind, name: str | None = None) -> MixtureRow:
        """The row of a kind, and of a name if it has several."""
        return next(row for row in self.rows if row.kind == kind and name in (None, row.name))

    def mean(self, kind: Kind, name: str | None = None) -> float:
        """Mean KL divergence over the distributions."""
        values = [quality.kl_divergence for quality in self.row(kind, name).distributions.values()]
        return sum(values) / len(values)

    @property
    def recovered(self) -> float | None:
        """Share of what the best choice gains over the best single variant that the router gains; None if nothing."""
        gain = self.mean("best-single") - self.mean("oracle")
        return (self.mean("best-single") - self.mean("router")) / gain if gain > 0 else None


def evaluate_mixture(
    mixture: str | Path,
    data: Data,
    *,
    against: str | Path | None = None,
    prompt: int | None = None,
    windows: int | None = DEFAULT_WINDOWS,
    report: Report = quiet,
    kernels: str = "reference",
) -> MixtureEvaluation:
    """Measure a mixture on held-out data: of text the router sees the beginning of each window, and what follows is
    scored; of images it sees what the variants see.

    >>> found = evaluate_mixture("runs/mix", {"wiki": "wiki.test.txt"}, windows=8)  # doctest: +SKIP
    >>> found.mean("router") <= found.mean("uniform-routing")  # doctest: +SKIP
    True

    Args:
        mixture: its folder.
        data: held-out texts or images; those that a variant or the router was fitted on are refused.
        against: the original; None means where the mixture was made from.
        prompt: tokens of each window that are the prompt; None: 64, or images.
        windows: per distribution, or images; None for all.
        report: called with the progress.
        kernels: that checkpoints compute with.

    Raises:
        MoqaError: if something is missing or damaged, or a text overlaps what was fitted on.
    """
    loaded = open_mixture(mixture, kernels=kernels)
    folder, record = loaded.folder, loaded.record
    first = folder / record.router.base
    task = task_of(read_config(first, packed=True))
    if prompt is not None and not task.predicts_each:
        raise MoqaError(f"--prompt {prompt} is of texts", f"{mixture} answers images: leave it out")
    prompt = DEFAULT_PROMPT if prompt is None else prompt
    if not 0 < prompt < CONTEXT - 1:
        raise MoqaError(f"--prompt {prompt} leaves nothing to read or to score", f"give 1 to {CONTEXT - 2}")
    reader = task.reader(first)
    sources = task.sources(data, reader)
    if not sources:
        raise MoqaError("no distribution to evaluate on", "give at least one --data NAME=FILE")
    cut = [task.cut(source, reader, CONTEXT, windows) for source in sources]
    for what, fitted in fitted_texts(folder, record).items():
        refuse_fitted(f"{folder}, {what},", fitted, sources, cut)
    reference, wanted = _reference(folder, record, against, cut, report)
    losses = {name: token_losses(loaded.use(name), cut, reference, report) for name in record.router.choices}
    return summarized(loaded, str(mixture), wanted, cut, losses, prompt if task.predicts_each else 0)


def summarized(
    loaded: Mixture, name: str, against: str, cut: Sequence[Samples], losses: dict[str, dict[str, TokenLosses]],
    prompt: int,
) -> MixtureEvaluation:  # fmt: skip
    """The evaluation that follows from the losses of every choice on some windows.

    Args:
        loaded: the mixture.
        name: as the user gave it.
        against: the original.
        cut: windows of each distribution.
        losses: choice -> distribution -> losses of its tokens.
        prompt: tokens of each window that are the prompt; 0: images.
    """
    record = loaded.record
    choices, after = list(record.router.choices), slice(max(prompt - 1, 0), None)
    routes = {w.name: [loaded.choose(one[:prompt] if prompt else one) for one in w.inputs] for w in cut}
    tables = {
        window.name: {
            kind: torch.stack([getattr(losses[c][window.name], kind)[:, after].float().mean(1) for c in choices])
            for kind in ("divergence", "likelihood", "right")
        }
        for window in cut
    }
    mean = torch.stack([table["divergence"].mean(1) for table in tables.values()]).mean(0)
    single = int(mean.argmin())

    def rows() -> Iterator[MixtureRow]:
        for index, choice in enumerate(choices):
            picks = {n: torch.full(t["divergence"].shape[1:], index) for n, t in tables.items()}
            yield _row("variant", choice, tables, picks)
            if index == single:
                yield _row("best-single", choice, tables, picks)
        yield MixtureRow(
            kind="uniform-routing", name="any",
            distributions={n: _quality(*(t[kind].mean(0) for kind in t)) for n, t in tables.items()},
        )  # fmt: skip
        picks = {n: torch.tensor([choices.index(route.variant) for route in found]) for n, found in routes.items()}
        yield _row("router", record.router.kind, tables, picks)
        yield _row("oracle", "best of each prompt", tables, {n: t["divergence"].argmin(0) for n, t in tables.items()})

    return MixtureEvaluation(
        mixture=name, against=against, bytes_total=record.account.total, bytes_resident=record.account.resident,
        context=record.router.context, prompt=prompt, prompts={window.name: len(window.inputs) for window in cut},
        usage={
            n: {c: sum(route.variant == c for route in found) / len(found) for c in choices}
            for n, found in routes.items()
        },
        confidence={n: sum(route.confidence or 0.0 for route in found) / len(found) for n, found in routes.items()},
        rows=tuple(rows()),
    )  # fmt: skip


def _row(kind: Kind, name: str, tables: dict[str, dict[str, Tensor]], picks: dict[str, Tensor]) -> MixtureRow:
    return MixtureRow(
        kind=kind, name=name,
        distributions={
            n: _quality(*(values.gather(0, picks[n][None])[0] for values in table.values()))
            for n, table in tables.items()
        },
    )  # fmt: skip


def _quality(divergence: Tensor, likelihood: Tensor, right: Tensor) -> MixtureQuality:
    """From [prompts] means over continuations."""
    spread = float(divergence.std()) if len(divergence) > 1 else 0.0
    return MixtureQuality(
        kl_divergence=_rounded(float(divergence.mean())), interval=_rounded(1.96 * spread / len(divergence) ** 0.5),
        perplexity=_rounded(float(likelihood.mean().exp())), top1_agreement=_rounded(float(right.mean())),
    )  # fmt: skip


def _rounded(value: float) -> float:
    return float(f"{value:.7g}")


def fitted_texts(folder: Path, record: MixtureRecord) -> dict[str, dict[str, Fitted]]:
    """Texts that each variant, and the router, was fitted on."""
    fitted = {"router": dict(record.router.fitted)}
    for name, variant in record.variants.items():
        fitted[name] = dict(
            read_adjustment(folder / name).record.fitted
            if variant.of
            else read_checkpoint(folder / name).manifest.fitted
        )
    return fitted


def _reference(
    folder: Path, record: MixtureRecord, against: str | Path | None, cut: list[Samples], report: Report
) -> tuple[Reference, str]:
    wanted = str(against) if against is not None else found(record.model, folder)
    where = original.locate(wanted)
    other = differing_part(where, record.fingerprint)
    if other:
        raise MoqaError(f"--against {wanted} is not the model that {folder} was made from", f"it has other {other}")
    return Reference.of(open_model(where).model, list(cut), report), wanted
