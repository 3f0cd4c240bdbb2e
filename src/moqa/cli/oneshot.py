"""The main job in one command: texts and a size in; checkpoint, proof and report out."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moqa.cli.common import mib, print_table, start_and_end, write_result
from moqa.cli.plan import print_estimate, print_fit
from moqa.cli.profile import warn_starved
from moqa.cli.progress import Log, progress
from moqa.cli.progress.limits import time_limited
from moqa.errors import MoqaError

if TYPE_CHECKING:
    from moqa.data import Source
    from moqa.evaluation.proof import Proof
    from moqa.execution import Executor
    from moqa.memory.limit import MemoryLimit
    from moqa.models.view import ModelView
    from moqa.planning import Budget, Plan
    from moqa.profiling import Profile


WINDOW = 256  # tokens
UNMEASURED = ("uniform", "moqa-v1")  # strategies that need no sensitivity


@dataclass(frozen=True)
class Wish:
    """Everything that was typed after `moqa quantize`."""

    model: str
    out: Path
    data: list[str]
    held_out: list[str]
    bpw: float | None
    size: str | None
    fit: str | None
    batch: int
    strategy: str
    ties: Any
    method: str
    widths: tuple[int, ...]
    hedge: float | None
    objective: Any
    scope: Any
    profile: Path
    samples: int
    context: int | None
    self_samples: int | None
    group_size: int
    symmetric: bool
    cache: str | None
    proof: bool
    overwrite: bool
    seed: int
    dry_run: bool
    memory: "MemoryLimit | None"
    time_limit: str | None
    restart: bool
    engine: "Executor"
    json: Path | None
    log_json: Log | None

    @property
    def window(self) -> int:
        """Tokens of a calibration window: with `fit`, `context` are those of a conversation."""
        return min(self.context or WINDOW, WINDOW) if self.fit else self.context or WINDOW


def fulfil(wish: Wish) -> None:
    """Profile, plan, quantize, evaluate beside plain plans, report.

    Raises:
        MoqaError: as each of these steps.
    """
    from moqa.evaluation.proof import ProofSetup, prove
    from moqa.methods.registry import find_method
    from moqa.models.view import open_model
    from moqa.originals import OriginalReader
    from moqa.originals.folder import locate
    from moqa.planning import Budget, MemoryBudget, for_file, memory_budget, plan
    from moqa.profiling import profile
    from moqa.profiling.store import RECORD
    from moqa.quantization import quantize
    from moqa.quantization.estimate import peak_bytes
    from moqa.quantization.run import disk_needed
    from moqa.storage.artifact import write_json
    from moqa.storage.space import check_space

    budget = (
        memory_budget(wish.model, wish.fit, context=wish.context, batch=wish.batch)
        if wish.fit
        else Budget.parse(wish.bpw, wish.size)
    )
    if isinstance(budget, MemoryBudget):
        budget.check(wish.widths, wish.group_size, wish.symmetric)
    if budget is None and wish.strategy not in ("moqa", "moqa-v1", "uniform"):
        raise MoqaError(f"--strategy {wish.strategy} needs a budget", "give --bpw, --size or --fit")
    memory = wish.engine.memory(wish.memory)
    folder = locate(wish.model)
    fitted, held_out, tokens = _texts(wish, folder)
    if wish.dry_run:
        _preview(wish, folder, budget, [distribution.name for distribution in fitted], memory, tokens)
        return
    view = open_model(folder, keep=memory.holds(OriginalReader(folder).values))
    if not (wish.profile / RECORD).is_file() and (budget is not None or wish.strategy == "uniform"):
        # after hours of measuring it would be late to find that the disk, or the memory, is too small
        expected, likely = _expected(wish, view, folder, budget, [distribution.name for distribution in fitted])
        method = find_method(wish.method)
        check_space(wish.out, disk_needed(view, likely, expected, method, wish.cache))
        peak_bytes(view, likely, expected, method, memory, profiled=False, held_out=tokens)
    with progress(wish.log_json) as shown:
        report = time_limited(shown, wish.time_limit)
        measured = profile(
            wish.model, fitted, wish.profile, samples=wish.samples, context=wish.window,
            self_samples=wish.self_samples, group_size=wish.group_size, symmetric=wish.symmetric,
            method=wish.method, seed=wish.seed, report=report, view=view, memory=memory, restart=wish.restart,
            sensitivity=wish.strategy not in UNMEASURED, engine=wish.engine,
        )  # fmt: skip
        chosen = plan(
            measured, budget, strategy=wish.strategy, ties=wish.ties, known=[d.name for d in fitted], widths=wish.widths,
            hedge=wish.hedge, objective=wish.objective, scope=wish.scope, seed=wish.seed,
        )  # fmt: skip
        if wish.overwrite or not _is_there(wish, chosen):
            # of a profile that was there already nobody has looked whether a proof by it fits
            peak_bytes(view, chosen, measured, find_method(wish.method), memory, profiled=True, held_out=tokens)
            quantize(
                wish.model, chosen, wish.out, method=wish.method, overwrite=wish.overwrite, report=report, profile=measured, view=view, cache=wish.cache, memory=memory,
                restart=wish.restart, engine=wish.engine,
            )  # fmt: skip
        write_json(for_file(chosen, wish.out / "plan.json"), wish.out / "plan.json")
        warn_starved(measured)
        if isinstance(budget, MemoryBudget):
            print_fit(budget, chosen.account)
        if not wish.proof:
            typer.echo(
                f"{wish.out}: {mib(chosen.account.checkpoint)}, {chosen.account.bits_per_weight:.3f} bits/weight"
            )
            write_result({"checkpoint": str(wish.out), "bytes": chosen.account.checkpoint}, wish.json)
            return
        bench = ProofSetup.open(
            wish.model, view, measured, held_out=held_out, windows=_windows(wish), report=report, memory=memory
        )
        proof = prove(bench, chosen, wish.out, wish.method, report)
    write_json(proof, wish.out / "proof.json")
    print_proof(proof, wish.out)
    _report(wish)
    write_result(proof, wish.json)


def _texts(wish: Wish, folder: Path) -> "tuple[list[Source], list[Source], int]":
    """Texts to fit on, texts to prove on, and how many tokens of these: as given, or a fifth of each held out."""
    from moqa.models.load import read_config
    from moqa.tasks import task_of

    task = task_of(read_config(folder))
    reader = task.reader(folder)
    given = task.sources(wish.data, reader)
    if not wish.proof:
        return given, [], 0
    if wish.held_out:
        fitted, held_out = given, task.sources(wish.held_out, reader)
    else:
        pairs = [task.split(distribution) for distribution in given]
        fitted, held_out = [first for first, _ in pairs], [second for _, second in pairs]
    # a text too short for the proof is better found now than when the checkpoint is written
    cut = [task.cut(distribution, reader, wish.window, _windows(wish)) for distribution in held_out]
    return fitted, held_out, sum(task.count(samples.inputs) for samples in cut)


def _windows(wish: Wish) -> int | None:
    """Windows of each held-out text: all of one that was given for it."""
    return None if wish.held_out else wish.samples


def _preview(
    wish: Wish, folder: Path, budget: "Budget | None", names: list[str], memory: "MemoryLimit", tokens: int
) -> None:
    """What the wish would cost: with the profile that is there, or before there is one."""
    from moqa.models.view import open_model
    from moqa.profiling.store import RECORD
    from moqa.quantization.estimate import estimate

    view, there = open_model(folder, keep=False), (wish.profile / RECORD).is_file()
    measured, chosen = _expected(wish, view, folder, budget, names)
    cost = estimate(
        folder,
        chosen,
        measured,
        method=wish.method,
        cache=wish.cache,
        memory=memory,
        profiled=there,
        view=view,
        before=start_and_end(),
        held_out=tokens,
    )
    print_estimate(cost, chosen, measured, wish.json)


def _expected(
    wish: Wish, view: "ModelView", folder: Path, budget: "Budget | None", names: list[str]
) -> "tuple[Profile, Plan]":  # fmt: skip
    """The profile that is there, or one of the same size that says nothing, and a plan from it."""
    from moqa.originals.folder import fingerprint
    from moqa.planning import plan
    from moqa.profiling import read_profile
    from moqa.profiling.blank import blank_profile
    from moqa.profiling.record import Settings
    from moqa.profiling.store import RECORD

    if (wish.profile / RECORD).is_file():
        measured = read_profile(wish.profile)
    else:
        settings = Settings(
            context=wish.window, samples=wish.samples, seed=wish.seed, group_size=wish.group_size,
            symmetric=wish.symmetric, method=wish.method, sensitivity=wish.strategy not in UNMEASURED,
        )  # fmt: skip
        own = wish.samples if wish.self_samples is None else wish.self_samples
        measured = blank_profile(view, wish.model, fingerprint(folder), names, settings, own)
    chosen = plan(
        measured, budget, strategy=wish.strategy, ties=wish.ties, known=names, widths=wish.widths, hedge=wish.hedge,
        objective=wish.objective, scope=wish.scope, seed=wish.seed,
    )  # fmt: skip
    return measured, chosen


def unproven(out: Path) -> bool:
    """Whether a run that was killed during its proof has left a checkpoint that is whole but without a proof."""
    return (out / "moqa.json").is_file() and not (out / "proof.json").is_file()


def _is_there(wish: Wish, chosen: "Plan") -> bool:
    """Whether the checkpoint that is wished for is there, but for its proof."""
    from moqa.format.cache import has_cache
    from moqa.format.reader import open_checkpoint

    if not unproven(wish.out):
        return False
    manifest = open_checkpoint(wish.out).manifest
    schemes = {name: unit.scheme for name, unit in manifest.units.items()}
    found = (manifest.fingerprint, manifest.method, schemes, has_cache(wish.out))
    return found == (chosen.fingerprint, wish.method, chosen.units, wish.cache is not None)


def _report(wish: Wish) -> None:
    from moqa.reports import report

    try:
        page = report([wish.profile, wish.out], wish.out / "report.html")
    except MoqaError as error:
        typer.echo(f"moqa: no report.html: {error}", err=True)
    else:
        typer.echo(f"report: {page}")


def print_proof(proof: "Proof", out: Path) -> None:
    """Our checkpoint and the plain ones in one table, and in one sentence per distribution what it is worth."""
    names = list(proof.ours.distributions)
    rows = []
    for row in (proof.ours, *proof.baselines):
        label = str(out) if row is proof.ours else f"{row.strategy} {row.bits_per_weight:.2f}"
        cells = [f"{row.distributions[n].kl_divergence:.4f} / {row.distributions[n].perplexity:.3f}" for n in names]
        rows.append([label, mib(row.bytes), f"{row.bits_per_weight:.3f}", *cells])
    headings = ["held-out KL / perplexity", "size", "bits/weight", *names]
    print_table(headings, rows)
    for name in names:
        gain = proof.gain(name)
        side = "below" if gain >= 0 else "ABOVE"
        typer.echo(f"{name}: KL divergence {abs(gain):.0%} {side} uniform {proof.ours.method} at the same bytes")
    for loss in proof.lost():
        typer.echo(f"moqa: warning: ours loses on {loss}", err=True)
