"""`moqa vla quantize`: apply a plan to a policy, through the same files, encodings and kernels as for any model."""

from pathlib import Path

from moqa.errors import MoqaError
from moqa.planning import Plan
from moqa.profiling import Profile, read_profile
from moqa.progress import Report, quiet
from moqa.quantization import quantize


def quantize_policy(
    policy: str | Path,
    plan: Plan,
    out: str | Path,
    *,
    method: str = "gptq",
    profile: Profile | None = None,
    overwrite: bool = False,
    restart: bool = False,
    report: Report = quiet,
) -> Path:
    """Quantize a policy by a plan and write it as a checkpoint, which `moqa.load` and `rollout` read.

    >>> quantize_policy("reference/policy", plan, "runs/policy-3bpw", profile=profile)  # doctest: +SKIP
    PosixPath('runs/policy-3bpw')

    Args:
        policy: folder of the original that the plan was made for.
        plan: scheme of every unit.
        out: folder to create.
        method: one of `moqa.quantization.METHODS`.
        profile: the plan's profile, which holds the observations; None reads it from where the plan says.
        overwrite: replace a checkpoint that exists at `out`.
        restart: start over, and discard what an earlier run has finished.
        report: called with each step and its progress.

    Raises:
        MoqaError: if the plan is of no policy, and as `moqa.quantize` does.
    """
    profile = profile or read_profile(plan.profile)
    if profile.record.task != "policy":
        raise MoqaError(f"the plan is for {plan.model}, which is no policy", "apply it with moqa quantize")
    return quantize(
        policy, plan, out, method=method, profile=profile, overwrite=overwrite, restart=restart, report=report
    )
