"""Proof: a checkpoint beside uniform and hand-rule ones of the same bytes, on held-out text."""

import gc
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import BaseModel, Field

from moqa.data import Source
from moqa.evaluation.measure import Reference
from moqa.evaluation.run import Evaluation, evaluate
from moqa.memory.limit import MemoryLimit
from moqa.memory.process import give_back
from moqa.models.view import ModelView
from moqa.planning import Plan, plan
from moqa.planning.registry import HAND_RULE, PLAIN
from moqa.profiling import Profile
from moqa.progress import Report
from moqa.quantization import quantize


class Proof(BaseModel, frozen=True):
    """What a checkpoint is worth beside the obvious ones (`proof.json`)."""

    ours: Evaluation
    baselines: tuple[Evaluation, ...] = Field(description="uniform plans around our size, and the hand rule at it")
    uniform: dict[str, float] = Field(
        description="KL divergence of uniform at our bytes: between the two uniform rows, linear in bytes and log KL"
    )

    def gain(self, name: str) -> float:
        """Share of uniform's KL divergence that ours saves on a distribution; negative if ours is worse."""
        ours = self.ours.distributions[name].kl_divergence or 0.0
        return 1 - ours / max(self.uniform[name], 1e-12)

    def lost(self) -> list[str]:
        """Each distribution and baseline of no more bytes than ours that has the lower divergence there."""
        found = []
        for name, quality in self.ours.distributions.items():
            ours = quality.kl_divergence or 0.0
            if ours > self.uniform[name]:
                found.append(f"{name}: uniform at the same bytes ({self.uniform[name]:.4f} against {ours:.4f})")
            for row in self.baselines:
                other = row.distributions[name].kl_divergence or 0.0
                if row.bytes <= self.ours.bytes and other < ours:
                    found.append(f"{name}: {row.strategy} ({other:.4f} against {ours:.4f})")
        return found


@dataclass(frozen=True)
class ProofSetup:
    """An original model, opened once for many checkpoints.

    Attributes:
        model: as the user gave it.
        view: the model for quantizing; its weights are restored after each.
        profile: statistics and samples.
        held_out: text that no fit saw.
        reference: the original's answers on it.
        memory: what quantizing may take, see `moqa.quantize`.
    """

    model: str
    view: ModelView
    profile: Profile
    held_out: tuple[Source, ...]
    reference: Reference
    memory: MemoryLimit | None = None

    @classmethod
    def open(
        cls, model: str, view: ModelView, profile: Profile, *, held_out: Sequence[Source], windows: int | None,
        report: Report, memory: MemoryLimit | None = None,
    ) -> "ProofSetup":  # fmt: skip
        """Run the original once on the held-out text."""
        assert view.folder is not None
        reader = view.task.reader(view.folder)
        cut = [view.task.cut(d, reader, profile.record.settings.context, windows) for d in held_out]
        return cls(model, view, profile, tuple(held_out), Reference.of(view.model, cut, report), memory)

    def run(self, chosen: Plan, method: str, report: Report, out: Path | None = None) -> Evaluation:
        """Quantize by a plan and measure what lies on disk; into a temporary folder if `out` is None."""
        with tempfile.TemporaryDirectory(prefix="moqa-") as temporary:
            target = out or Path(temporary) / "checkpoint"
            if out is None or not out.exists():
                quantize(
                    self.model, chosen, target, method=method, report=report, profile=self.profile, view=self.view,
                    memory=self.memory,
                )  # fmt: skip
            give_back()
            found = evaluate(target, self.held_out, against=self.model, report=report, reference=self.reference)
            # a model refers to itself: until it is found to be garbage, its mapped checkpoint takes memory
            gc.collect()
            return found


def prove(bench: ProofSetup, chosen: Plan, out: Path, method: str, report: Report) -> Proof:
    """Measure a checkpoint beside uniform and hand-rule ones.

    Args:
        bench: the original and the held-out text.
        chosen: the plan of the checkpoint.
        out: the checkpoint.
        method: quantization method of all rows.
        report: called with what is done, how much of it, and of how much.

    Raises:
        MoqaError: if a text is unusable.
    """
    ours = bench.run(chosen, method, report, out)
    rows = [bench.run(other, method, report) for other in baselines(bench.profile, chosen)]
    around = [row for row in rows if row.strategy == PLAIN]
    uniform = {name: _at_bytes(around, name, ours.bytes) for name in ours.distributions}
    return Proof(ours=ours, baselines=tuple(rows), uniform=uniform)


def baselines(profile: Profile, chosen: Plan) -> list[Plan]:
    """Plans that a checkpoint is compared with: the largest uniform one within its bytes, the smallest above, and where
    there are experts the hand rule."""
    of = partial(plan, profile, ties=chosen.ties, known=chosen.known)
    plans = [of(None, strategy=PLAIN, widths=[width]) for width in profile.record.widths]
    fitting = [p for p in plans if p.account.checkpoint <= chosen.account.checkpoint]
    larger = [p for p in plans if p.account.checkpoint > chosen.account.checkpoint]
    rule = [of(f"{chosen.account.checkpoint}B", strategy=HAND_RULE)] if profile.expert_layers else []
    return [*fitting[-1:], *larger[:1], *rule]


def _at_bytes(rows: Sequence[Evaluation], name: str, size: int) -> float:
    """KL divergence at a size between two rows."""
    values = [max(row.distributions[name].kl_divergence or 0.0, 1e-12) for row in rows]
    if len(rows) == 1:
        return values[0]
    share = (size - rows[0].bytes) / (rows[1].bytes - rows[0].bytes)
    return math.exp((1 - share) * math.log(values[0]) + share * math.log(values[1]))
