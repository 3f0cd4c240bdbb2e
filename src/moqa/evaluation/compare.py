"""`moqa.compare_plans`: which strategy places the bits of a budget best, as expected and as measured."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field

from moqa.data import Data
from moqa.errors import MoqaError
from moqa.evaluation.measure import Reference, divergences
from moqa.evaluation.run import DEFAULT_WINDOWS, refuse_fitted
from moqa.format.reader import open_checkpoint
from moqa.models.view import open_model
from moqa.planning.budget import Budget
from moqa.planning.compare import known_gain, plans_of_all, ranked
from moqa.planning.record import Gain, Plan
from moqa.planning.registry import STRATEGIES
from moqa.profiling import SELF, Profile
from moqa.progress import Report, quiet
from moqa.quantization import quantize
from moqa.runtime.load import load_packed
from moqa.storage.temporary import temporary_folder


class MeasuredDivergence(BaseModel, frozen=True):
    """KL divergence from the original on one held-out text."""

    kl_divergence: float = Field(description="mean per prediction, nats")
    interval: float = Field(description="half of the interval that has the mean of all such windows with 95 %")
    windows: int = Field(description="that were measured")


class RankedPlan(BaseModel, frozen=True):
    """One strategy at the budget."""

    strategy: str
    made_by: str = Field(description="the strategy whose plan it is, where one takes that of another")
    is_control: bool = Field(description="only for comparisons: a control, or a rule of the literature")
    bits_per_weight: float
    bytes: int = Field(description="all weight files")
    expected: float | None = Field(description="KL divergence per token on the known texts, nats; null: not measured")
    expected_own: float | None = Field(description="the same on the model's own text")
    over_uniform: Gain | None = Field(description="of its bytes: share of the expected divergence that is saved")
    measured: dict[str, MeasuredDivergence] = Field({}, description="held-out text -> divergence")

    def mean(self, names: Iterable[str]) -> float:
        """Mean measured divergence over some texts."""
        found = [self.measured[name].kl_divergence for name in names]
        return sum(found) / len(found)


class PlanComparison(BaseModel, frozen=True):
    """Output of `moqa compare-plans --json`."""

    model: str
    budget: str
    known: tuple[str, ...]
    method: str | None = Field(None, description="quantization method of the measured plans")
    plans: tuple[RankedPlan, ...] = Field(description="the best first: by what is measured, else by what is expected")
    without: dict[str, str] = Field(description="strategies that have no plan, and why")


def compare_plans(
    profile: Profile,
    budget: Budget | str,
    *,
    strategies: Iterable[str] | None = None,
    data: Data | None = None,
    windows: int | None = DEFAULT_WINDOWS,
    method: str | None = None,
    report: Report = quiet,
    **options: Any,
) -> PlanComparison:
    """Rank the plans of all strategies at one budget.

    >>> found = moqa.compare_plans(profile, "4bpw", strategies=["uniform", "budget", "random"])
    >>> found.plans[0].strategy
    'budget'

    Args:
        profile: statistics of the model.
        budget: limit in bytes, as for `moqa.plan`.
        strategies: names; None means all.
        data: held-out texts: every plan is quantized, and its divergence is measured on them. The plan that is expected
            to be the best was chosen by the very numbers that the expectation comes from; only these texts were not.
        windows: of each text; None for all.
        method: quantization method of the measured plans; None means that of the profile.
        report: called with the name of a step, how much of it is done, and its total.
        options: of `moqa.plan`, for all strategies.

    Raises:
        MoqaError: if a named strategy has no plan, or a text is unusable or was fitted on.
    """
    plans, without = plans_of_all(profile, budget, strategies, **options)
    known = next(iter(plans.values())).known
    how = method or profile.record.settings.method
    order = ranked(plans)
    measured = {} if data is None else _measured(profile, plans, data, windows, how, report)
    rows = [_row(profile, name, plans[name], measured.get(name, {})) for name in order]
    if measured:
        rows.sort(key=lambda row: row.mean(row.measured))
    return PlanComparison(
        model=profile.original, budget=next(iter(plans.values())).budget or "", known=known,
        method=how if measured else None, plans=tuple(rows), without=without,
    )  # fmt: skip


def _row(profile: Profile, name: str, made: Plan, measured: dict[str, MeasuredDivergence]) -> RankedPlan:
    told = made.predicted
    return RankedPlan(
        strategy=name, made_by=made.strategy, is_control=STRATEGIES[name].is_control,
        bits_per_weight=made.account.bits_per_weight, bytes=made.account.checkpoint,
        expected=sum(told[text] for text in made.known) / len(made.known) if told else None,
        expected_own=told.get(SELF), over_uniform=known_gain(profile, made),
        measured=measured,
    )  # fmt: skip


def _measured(
    profile: Profile, plans: dict[str, Plan], data: Data, windows: int | None, method: str, report: Report
) -> dict[str, dict[str, MeasuredDivergence]]:
    """Divergences of quantized plans on held-out texts; equal plans are quantized once."""
    view = open_model(profile.original)
    assert view.folder is not None
    reader, context = view.task.reader(view.folder), profile.record.settings.context
    texts = view.task.sources(data, reader)
    if not texts:
        raise MoqaError("no text to measure on", "give at least one --data NAME=FILE")
    cut = [view.task.cut(text, reader, context, windows) for text in texts]
    fitted = {name: profile.record.distributions[name].fitted for name in next(iter(plans.values())).known}
    refuse_fitted(f"the profile {profile.folder}", {n: f for n, f in fitted.items() if f is not None}, texts, cut)
    reference = Reference.of(view.model, list(cut), report)
    done: list[tuple[Plan, dict[str, MeasuredDivergence]]] = []
    found: dict[str, dict[str, MeasuredDivergence]] = {}
    for number, (name, made) in enumerate(plans.items()):
        report(f"quantize and measure {name}", number, len(plans))
        same = next((rows for other, rows in done if (other.units, other.mixture) == (made.units, made.mixture)), None)
        if same is None:
            with temporary_folder() as folder:
                out = folder / "checkpoint"
                quantize(profile.original, made, out, method=method, profile=profile, view=view)
                same = _divergences(out, reference)
            done.append((made, same))
        found[name] = same
    report("quantize and measure", len(plans), len(plans))
    return found


def _divergences(out: Path, reference: Reference) -> dict[str, MeasuredDivergence]:
    measured = divergences(load_packed(open_checkpoint(out), kernels="reference"), reference, quiet)
    return {name: of_windows(values) for name, values in measured.items()}


def of_windows(values: torch.Tensor) -> MeasuredDivergence:
    """Mean and interval over windows.

    >>> of_windows(torch.tensor([0.25, 0.75])).kl_divergence
    0.5
    """
    spread = float(values.std()) if len(values) > 1 else 0.0
    return MeasuredDivergence(
        kl_divergence=float(values.double().mean()), interval=1.96 * spread / len(values) ** 0.5,
        windows=len(values),
    )  # fmt: skip
