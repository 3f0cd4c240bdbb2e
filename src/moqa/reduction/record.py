"""What a reduced model says about how it was made (`reduction.json`)."""

from pathlib import Path

from pydantic import BaseModel, Field

from moqa.format.manifest import Fitted
from moqa.storage.artifact import check_seal, read_json

REDUCTION = "reduction.json"


class ReductionRecord(BaseModel, frozen=True):
    """How the experts of a model were reduced."""

    moqa: str
    model: str = Field(description="the original as the user gave it")
    fingerprint: str = Field(description="of the original")
    by: str = Field(description="member of the registry of reductions")
    experts: int = Field(description="of each block")
    before: int = Field(description="of each block of the original")
    groups: dict[int, tuple[int, ...]] = Field(
        description="block -> the new expert of each of the original's; -1 for those that were dropped"
    )
    fitted: dict[str, Fitted] = Field(description="texts that decided it")
    seed: int = 0


def read_reduction(folder: Path) -> ReductionRecord | None:
    """The record of a reduced model; None for other models.

    Raises:
        MoqaError: if it was changed.
    """
    path = folder / REDUCTION
    if not path.is_file():
        return None
    found = read_json(ReductionRecord, path)
    check_seal(path)
    return found
