"""What exports are made from: plans, profiles, the original."""

from pathlib import Path

from moqa.errors import MoqaError
from moqa.exports.registry import ExportJob
from moqa.format.reader import is_checkpoint
from moqa.models.view import ModelView, open_model
from moqa.originals import folder as original
from moqa.originals.fingerprint import differing_part
from moqa.planning import PLAN, Plan, check_profile, read_plan
from moqa.profiling import Profile, read_profile


def planned(job: ExportJob, engine: str) -> tuple[Plan, Profile]:
    """The plan of a job, or of the checkpoint that it names, with its profile.

    Raises:
        MoqaError: if it is none, is for another engine, or its profile is missing or another one's.
    """
    path = Path(job.source)
    if is_checkpoint(path):
        path /= PLAN
        if not path.is_file():
            raise MoqaError(
                f"{job.source} has no {PLAN}, and its schemes are not those of {engine}",
                f"plan for it: moqa plan PROFILE --engine {engine} --bpw BITS -o plan.json",
            )
    plan = read_plan(path)
    if plan.engine != engine:
        budget = plan.budget or "--bpw BITS"
        raise MoqaError(
            f"{job.source} is a plan for {plan.engine}, whose schemes {engine} does not run",
            f"plan for it: moqa plan {plan.profile} --engine {engine} {budget} -o plan.json",
        )
    try:
        profile = job.profile or read_profile(plan.profile)
    except MoqaError as error:
        raise MoqaError("the plan's samples are missing", f"{error}; give the folder with --profile") from None
    check_profile(plan, profile)
    return plan, profile


def opened(job: ExportJob, profile: Profile) -> ModelView:
    """The original of a profile, read when it is used.

    Raises:
        MoqaError: if it is missing, or another model.
    """
    model = job.model or profile.original
    folder = original.locate(model)
    if other := differing_part(folder, profile.record.fingerprint):
        raise MoqaError(f"{model} is not the model of profile {profile.folder}", f"it has other {other}")
    return open_model(folder, keep=False)
