"""What the main job has made, and how it is stored."""

from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel

from moqa.errors import MoqaError
from moqa.evaluation.proof import Proof
from moqa.planning import Budget, Plan, for_file
from moqa.profiling import Profile
from moqa.reports import report
from moqa.storage.artifact import write_json

PLAN, PROOF, REPORT = "plan.json", "proof.json", "report.html"


@dataclass(frozen=True)
class CompressResult:
    """A checkpoint, and all that it came from.

    Attributes:
        checkpoint: its folder.
        plan: scheme of every unit.
        profile: statistics that the plan was made from.
        budget: the limit that the plan keeps.
        proof: the checkpoint beside plain ones of its size; None if none was wanted, or it is not made yet.
        report: the page, if there is one.
        no_report: why there is a proof and no page.
    """

    checkpoint: Path
    plan: Plan
    profile: Profile
    budget: Budget | None
    proof: Proof | None = None
    report: Path | None = None
    no_report: str | None = None

    def store(self) -> "CompressResult":
        """Write the plan, and what there is of a proof, into the checkpoint's folder.

        Returns:
            The same, with the page that was made.
        """
        write_json(for_file(self.plan, self.checkpoint / PLAN), self.checkpoint / PLAN)
        if self.proof is None:
            return self
        write_json(self.proof, self.checkpoint / PROOF)
        try:
            page = report([self.profile.folder, self.checkpoint], self.checkpoint / REPORT)
        except MoqaError as error:
            return replace(self, no_report=str(error))
        return replace(self, report=page)

    def summary(self) -> BaseModel | dict[str, str | int]:
        """What is worth telling a machine: the proof, or what was written."""
        return self.proof or {"checkpoint": str(self.checkpoint), "bytes": self.plan.account.checkpoint}


def lacks_proof(out: Path) -> bool:
    """Whether a run that was killed during its proof has left a checkpoint that is whole but without a proof."""
    return (out / "moqa.json").is_file() and not (out / PROOF).is_file()
