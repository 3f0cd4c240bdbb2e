"""The result of `moqa.compress`, and how it is stored."""

from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel

from moqa.evaluation.proof import PROOF, Proof
from moqa.planning import PLAN, Budget, Plan, for_file
from moqa.profiling import Profile
from moqa.quantization.card import add_results
from moqa.reports import report
from moqa.storage.artifact import write_json, write_sealed

REPORT = "report.html"


@dataclass(frozen=True)
class CompressResult:
    """A checkpoint and everything that it was made from.

    Attributes:
        checkpoint: folder of the checkpoint.
        plan: scheme of every unit.
        profile: profile that the plan was made from.
        budget: limit that the plan keeps.
        proof: comparison with baselines of the same size; None if not requested or not made yet.
        report: path of the HTML report, if there is one.
    """

    checkpoint: Path
    plan: Plan
    profile: Profile
    budget: Budget | None
    proof: Proof | None = None
    report: Path | None = None

    def store(self) -> "CompressResult":
        """Write the plan, and the proof if there is one, into the checkpoint folder.

        Returns:
            The result, with the path of the report.
        """
        write_sealed(for_file(self.plan, self.checkpoint / PLAN), self.checkpoint / PLAN)
        if self.proof is None:
            return self
        add_results(self.checkpoint, _table(self.proof))
        write_json(self.proof, self.checkpoint / PROOF)
        return replace(self, report=report([self.profile.folder, self.checkpoint], self.checkpoint / REPORT))

    def summary(self) -> BaseModel | dict[str, str | int]:
        """The result for `--json`: the proof, or what was written."""
        return self.proof or {"checkpoint": str(self.checkpoint), "bytes": self.plan.account.checkpoint}


def _table(proof: Proof) -> str:
    """The proof as a table of Markdown."""
    names = list(proof.ours.distributions)
    rows = [["KL divergence / perplexity", "size", "bits per weight", *names], ["---"] * (3 + len(names))]
    for row in (proof.ours, *proof.baselines):
        scores = [f"{q.kl_divergence:.4f} / {q.perplexity:.3f}" for q in row.distributions.values()]
        name = "this checkpoint" if row is proof.ours else str(row.strategy)
        rows.append([name, f"{row.bytes / 2**20:.2f} MiB", f"{row.bits_per_weight:.3f}", *scores])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def is_unfinished(out: Path, proof: bool) -> bool:
    """Whether a folder holds a complete checkpoint without its plan or proof, as a run leaves that is killed then.

    Args:
        out: the folder.
        proof: whether there should be a proof.
    """
    return (out / "moqa.json").is_file() and not all((out / name).is_file() for name in (PLAN, *[PROOF] * proof))
