"""Proof: a checkpoint compared with uniform and hand-rule checkpoints of the same size, on held-out data."""

import gc
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from pydantic import BaseModel, Field

from moqa.data import Source
from moqa.errors import MoqaError
from moqa.evaluation.measure import Quality, Reference
from moqa.evaluation.run import Evaluation, evaluate, evaluate_original
from moqa.memory.limit import MemoryLimit
from moqa.memory.process import give_back
from moqa.models.view import ModelView
from moqa.planning import Plan, plan
from moqa.planning.registry import HAND_RULE, PLAIN
from moqa.profiling import Profile
from moqa.progress import Report
from moqa.quantization import quantize
from moqa.storage.paths import label, recorded
from moqa.storage.temporary import temporary_folder

PROOF = "proof.json"


class Proof(BaseModel, frozen=True):
    """How a checkpoint compares with simple ones of the same size (`proof.json`)."""

    original: Evaluation | None = Field(None, description="the original; None in proofs of moqa 0.1")
    ours: Evaluation
    baselines: tuple[Evaluation, ...] = Field(
        description="uniform plans just below and above our size, and the hand rule at our size"
    )
    uniform: dict[str, float] = Field(
        description="KL divergence of a uniform plan at our size: interpolated, linear in bytes and log KL"
    )

    def gain(self, name: str) -> float:
        """Share by which our KL divergence on a distribution is below uniform's; negative if ours is higher."""
        ours = self.ours.distributions[name].kl_divergence or 0.0
        return 1 - ours / max(self.uniform[name], 1e-12)

    def lost(self) -> list[str]:
        """Where we lose: each distribution with a baseline that has a lower divergence and is not larger than ours."""
        losses = []
        for name, quality in self.ours.distributions.items():
            ours = quality.kl_divergence or 0.0
            if ours > self.uniform[name]:
                losses.append(f"{name}: uniform at the same bytes ({self.uniform[name]:.4f} against {ours:.4f})")
            for row in self.baselines:
                other = row.distributions[name].kl_divergence or 0.0
                if row.bytes <= self.ours.bytes and other < ours:
                    losses.append(f"{name}: {row.strategy} ({other:.4f} against {ours:.4f})")
        return losses


class ProofSetup:
    """An original model, run once on held-out text for many checkpoints.

    Args:
        model: as the user gave it.
        view: the model for quantizing; its weights are restored after each run.
        profile: statistics and samples.
        held_out: text that no fit saw.
        windows: of each text; None for all.
        report: called with the progress.
        memory: what quantizing may use, see `moqa.quantize`.

    Attributes:
        profile: statistics and samples.
        reference: the original's outputs on the held-out text.
    """

    def __init__(
        self, model: str, view: ModelView, profile: Profile, *, held_out: Sequence[Source], windows: int | None,
        report: Report, memory: MemoryLimit | None = None,
    ) -> None:  # fmt: skip
        assert view.folder is not None
        self._model, self._view, self._held_out, self._memory, self.profile = model, view, held_out, memory, profile
        reader = view.task.reader(view.folder)
        self._context = profile.record.settings.context
        cut = [view.task.cut(d, reader, self._context, windows) for d in held_out]
        self.reference = Reference.of(view.model, cut, report)

    def original(self, report: Report) -> Evaluation:
        """Measure the original on the held-out text, from its outputs, which are known."""
        return evaluate_original(self._model, self._view, self.reference, self._context, report)

    def run(self, chosen: Plan, method: str, report: Report, out: Path | None = None) -> Evaluation:
        """Quantize by a plan and measure the checkpoint on disk; in a temporary folder if `out` is None."""
        with temporary_folder() as temporary:
            target = out or temporary / "checkpoint"
            if out is None or not out.exists():
                quantize(
                    self._model, chosen, target, method=method, report=report, profile=self.profile, view=self._view,
                    memory=self._memory,
                )  # fmt: skip
            give_back()
            evaluation = evaluate(
                target, self._held_out, against=self._model, context=self._context, report=report,
                reference=self.reference,
            )  # fmt: skip
            # models have reference cycles: until they are collected, the mapped checkpoint takes memory
            gc.collect()
            return evaluation


def prove(bench: ProofSetup, chosen: Plan, out: Path, method: str, report: Report) -> Proof:
    """Measure a checkpoint and the baselines that it is compared with.

    Args:
        bench: the original and the held-out text.
        chosen: the plan of the checkpoint.
        out: the checkpoint.
        method: quantization method of all rows.
        report: called with the name of a step, how much of it is done, and its total.

    Raises:
        MoqaError: if a text is unusable.
    """
    ours = _portable(bench.run(chosen, method, report, out), out)
    rows = [_portable(bench.run(other, method, report), out) for other in baselines(bench.profile, chosen)]
    around = [row for row in rows if row.strategy == PLAIN]
    at_bytes = interpolated(around, ours.bytes).distributions
    uniform = {name: quality.kl_divergence or 0.0 for name, quality in at_bytes.items()}
    return Proof(original=_portable(bench.original(report), out), ours=ours, baselines=tuple(rows), uniform=uniform)


def baselines(profile: Profile, chosen: Plan) -> list[Plan]:
    """Plans that a checkpoint is compared with: the largest uniform plan within its size, the smallest above it, and
    the hand rule if the model has experts."""
    of = partial(plan, profile, ties=chosen.ties, known=chosen.known)
    plans = [of(None, strategy=PLAIN, widths=[width]) for width in profile.record.widths]
    fitting = [p for p in plans if p.account.checkpoint <= chosen.account.checkpoint]
    larger = [p for p in plans if p.account.checkpoint > chosen.account.checkpoint]
    return [*fitting[-1:], *larger[:1], *([_hand_rule(of, chosen)] if profile.expert_layers else [])]


def _hand_rule(of: Callable[..., Plan], chosen: Plan) -> Plan:
    """The hand rule at the bytes of a plan, which may be too few for its floor."""
    size = f"{chosen.account.checkpoint}B"
    try:
        return of(size, strategy=HAND_RULE)
    except MoqaError:
        return of(size, strategy=HAND_RULE, floors={})


def interpolated(rows: Sequence[Evaluation], size: int) -> Evaluation:
    """Quality at a size from one evaluation, or between two: linear in bytes, log KL and log perplexity.

    Args:
        rows: one or two evaluations of the same texts.
        size: bytes of all weight files.
    """
    low, high = rows[0], rows[-1]
    share = (size - low.bytes) / (high.bytes - low.bytes) if low is not high else 0.0

    def mixed(a: float, b: float) -> float:
        return math.exp((1 - share) * math.log(max(a, 1e-12)) + share * math.log(max(b, 1e-12)))

    return low.model_copy(update={
        "bytes": size,
        **{name: (1 - share) * getattr(low, name) + share * getattr(high, name)
           for name in ("bits_per_weight", "model_bits_per_weight")},
        "distributions": {
            name: Quality(
                perplexity=mixed(q.perplexity, high.distributions[name].perplexity), tokens=q.tokens,
                kl_divergence=mixed(q.kl_divergence or 0.0, high.distributions[name].kl_divergence or 0.0),
                top1_agreement=None,
            )
            for name, q in low.distributions.items()
        },
    })  # fmt: skip


def _portable(row: Evaluation, out: Path) -> Evaluation:
    """An evaluation as it is kept in a checkpoint, wherever that goes."""
    return row.model_copy(update={"model": label(row.model), "against": row.against and recorded(row.against, out)})
