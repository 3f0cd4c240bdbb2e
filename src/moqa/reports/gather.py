"""Find artifacts at given paths and in given folders."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from moqa.errors import MoqaError
from moqa.evaluation.proof import PROOF, Proof
from moqa.evaluation.run import Evaluation
from moqa.format import adjustment
from moqa.format.adjustment import Adjustment, read_adjustment
from moqa.format.manifest import FORMAT, MANIFEST, Manifest
from moqa.format.reader import Checkpoint
from moqa.mixture.evaluate import MixtureEvaluation
from moqa.mixture.record import MIXTURE, MixtureRecord, read_mixture
from moqa.originals.hub import is_id, on_disk
from moqa.planning import PLAN, Plan, read_plan
from moqa.profiling.record import ProfileRecord
from moqa.profiling.store import RECORD, Profile, read_profile
from moqa.storage.artifact import Record, check_format, read_json

SUMMARY = "summary.json"
KINDS = (
    f"a profile folder ({RECORD}), a plan, a checkpoint folder ({MANIFEST}), an evaluation, a {PROOF}, "
    f"an adjustment folder ({adjustment.RECORD}), a mixture folder ({MIXTURE}), a {SUMMARY}, "
    "or a folder that contains these"
)


class Summary(BaseModel, frozen=True):
    """The part of a demo run's `summary.json` that a report uses; other fields are ignored."""

    roles: dict[str, Literal["known", "novel"]] = Field(description="distribution -> its role in the run")


@dataclass
class Artifacts:
    """All artifacts that were found.

    Attributes:
        plans: file name without extension, or the whole path if names repeat -> plan.
        evaluations: all distinct evaluations, with those of the proofs.
        proofs: comparisons of checkpoints with baselines of the same size.
        roles: distribution -> `known` or `novel`, from summaries.
    """

    profiles: list[Profile] = field(default_factory=list)
    plans: dict[str, Plan] = field(default_factory=dict)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    proofs: list[Proof] = field(default_factory=list)
    adjustments: list[Adjustment] = field(default_factory=list)
    mixtures: dict[Path, MixtureRecord] = field(default_factory=dict)
    mixture_evaluations: list[MixtureEvaluation] = field(default_factory=list)
    roles: dict[str, Literal["known", "novel"]] = field(default_factory=dict)

    def add(self, *evaluations: Evaluation | None) -> None:
        """Add evaluations that are not there yet."""
        for evaluation in evaluations:
            if evaluation is not None and evaluation not in self.evaluations:
                self.evaluations.append(evaluation)

    @property
    def profile(self) -> Profile | None:
        """The profile to show: the one with most distributions."""
        return max(self.profiles, key=lambda profile: len(profile.statistics), default=None)

    @property
    def records(self) -> list[ProfileRecord | Plan | Manifest]:
        """What says which model it belongs to: records of profiles, then plans, then manifests."""
        profiles, manifests = [p.record for p in self.profiles], [c.manifest for c in self.checkpoints]
        return [*profiles, *self.plans.values(), *manifests]

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Fingerprints of all models that the artifacts belong to."""
        return tuple(dict.fromkeys(record.fingerprint for record in self.records))


def gather(paths: Sequence[str | Path]) -> Artifacts:
    """Read all artifacts at the given paths and, recursively, in the given folders.

    >>> len(gather(["runs/out"]).checkpoints)
    1

    Raises:
        MoqaError: if a path does not exist, a given file is not an artifact, or no artifact is found.
    """
    found, seen = Artifacts(), set[Path]()
    for path in (on_disk(path) if is_id(path) else Path(path) for path in paths):
        if path.is_dir():
            for file in sorted(path.rglob("*.json")):
                beside_manifest = file.name not in (MANIFEST, PROOF, PLAN) and (file.parent / MANIFEST).is_file()
                if not beside_manifest and file.resolve() not in seen:
                    seen.add(file.resolve())
                    _take(file, found)
        elif not path.exists():
            raise MoqaError(f"there is nothing at {path}", f"a report is made from {KINDS}")
        elif path.resolve() not in seen:
            seen.add(path.resolve())
            if not _take(path, found):
                raise MoqaError(f"{path} is not an artifact", f"a report is made from {KINDS}")
    if not (
        found.profiles or found.plans or found.checkpoints or found.evaluations or found.adjustments
        or found.mixtures or found.mixture_evaluations
    ):  # fmt: skip
        raise MoqaError(f"no artifact in {', '.join(map(str, paths)) or 'nothing'}", f"a report is made from {KINDS}")
    return found


def _take(file: Path, found: Artifacts) -> bool:
    """Add the artifact that a file belongs to; False if it is not part of one."""
    if file.name == RECORD:
        found.profiles.append(read_profile(file.parent))
    elif file.name == MANIFEST:
        found.checkpoints.append(_checkpoint(file.parent))
    elif file.name == adjustment.RECORD:
        found.adjustments.append(read_adjustment(file.parent))
    elif file.name == MIXTURE:
        found.mixtures[file.parent] = read_mixture(file.parent)
    else:
        return _take_record(file, found)
    return True


def _take_record(file: Path, found: Artifacts) -> bool:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if _as(Plan, data):
        name = file.stem if file.stem not in found.plans else str(file.with_suffix(""))
        found.plans[name] = read_plan(file)
    elif measured := _as(MixtureEvaluation, data):
        found.mixture_evaluations.append(measured)
    elif evaluation := _as(Evaluation, data):
        found.add(evaluation)
    elif proof := _as(Proof, data):
        found.proofs.append(proof)
        found.add(proof.original, proof.ours, *proof.baselines)
    elif file.name == SUMMARY and (summary := _as(Summary, data)):
        found.roles.update(summary.roles)
    else:
        return False
    return True


def _as(kind: type[Record], data: object) -> Record | None:
    try:
        return kind.model_validate(data)
    except ValidationError:
        return None


def _checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint by its manifest; its weights are not read."""
    manifest = read_json(Manifest, folder / MANIFEST)
    check_format(f"{folder} has", manifest.format, FORMAT)
    return Checkpoint(folder, manifest)
