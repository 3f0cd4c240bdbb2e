"""`moqa quantize`: apply a plan, or run all steps from texts and a size."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moqa.cli import options
from moqa.cli.app import app
from moqa.cli.common import mib, print_table, say, start_and_end, warn_left_out, write_result
from moqa.cli.parse import DEFAULT_ENCODINGS, DEFAULT_WIDTHS, candidates_of, widths_nested_of
from moqa.cli.plan import check_budgets, print_estimate, print_fit, say_if_uniform
from moqa.cli.profile import warn_starved
from moqa.cli.progress import LogOption, logged, progress
from moqa.cli.progress.limits import time_limited
from moqa.cli.recipe import Config
from moqa.compression.options import DEFAULTS, CompressOptions
from moqa.errors import MoqaError
from moqa.execution.registry import DEFAULT_EXECUTOR

if TYPE_CHECKING:
    from moqa.compression.result import CompressResult
    from moqa.evaluation.proof import Proof


@app.command()
@logged
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="folder or Hub id of the original model")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="checkpoint folder to make")],
    plan: Annotated[
        Path | None, typer.Option("--plan", help="plan to apply; without it, give --data and a budget")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="NAME=SOURCE", help="texts the model will see")
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option("--held-out", metavar="NAME=SOURCE", help="texts for the proof [default: a fifth of --data]"),
    ] = None,
    bpw: options.Bpw = None,
    size: options.Size = None,
    fit: options.Fit = None,
    batch: options.Batch = None,
    strategy: options.Strategy = DEFAULTS.strategy,
    ties: options.Ties = DEFAULTS.ties,
    method: options.Method = DEFAULTS.method,
    widths: str = DEFAULT_WIDTHS,
    widths_nested: options.WidthsNested = None,
    encodings: options.Encodings = DEFAULT_ENCODINGS,
    groups: options.Groups = None,
    floor: options.Floor = None,
    hedge: float | None = DEFAULTS.hedge,
    objective: options.Objective = DEFAULTS.objective,
    scope: options.Scope = DEFAULTS.scope,
    ignore: options.Ignore = None,
    set_width: options.SetWidth = None,
    profile: Annotated[Path | None, typer.Option("--profile")] = DEFAULTS.profile,
    samples: options.Samples = DEFAULTS.samples,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=2,
            help="tokens of a window [default: 256]; with --fit: of a served conversation [default: 8192, or the "
            "model's], and windows have as many but at most 256",
        ),
    ] = None,
    self_samples: options.SelfSamples = DEFAULTS.self_samples,
    group_size: options.GroupSize = DEFAULTS.group_size,
    symmetric: options.Symmetric = DEFAULTS.symmetric,
    cache: Annotated[str | None, typer.Option("--cache", metavar="SHARE")] = DEFAULTS.cache,
    recover: Annotated[str | None, typer.Option("--recover", metavar="LENGTH")] = DEFAULTS.recover,
    optimizer: options.Optimizer = DEFAULTS.optimizer,
    proof: Annotated[bool, typer.Option("--proof/--no-proof")] = DEFAULTS.proof,
    overwrite: options.Overwrite = DEFAULTS.overwrite,
    seed: int = DEFAULTS.seed,
    max_memory: options.MaxMemory = None,
    time_limit: options.TimeLimit = None,
    restart: options.Restart = DEFAULTS.restart,
    engine: options.Engine = DEFAULT_EXECUTOR,
    ray_address: options.RayAddress = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="estimate bytes, memory, disk and time, and do nothing")
    ] = False,
    config: Config = None,  # noqa: ARG001
    json: options.Json = None,
    log_json: LogOption = None,
) -> None:
    """Quantize a model by a plan, or from the texts it will see and a size, with a proof on held-out text."""
    from moqa.execution import find_executor
    from moqa.memory.limit import MemoryLimit

    nested = widths_nested_of(widths_nested)
    if nested and dry_run:
        raise MoqaError(f"--widths-nested {widths_nested} is not known to --dry-run", "estimate the widest width alone")
    memory = MemoryLimit.parse(max_memory) if max_memory else None
    executor = find_executor(engine, address=ray_address)
    if plan is not None:
        from moqa.estimate import estimate
        from moqa.models.view import open_model
        from moqa.originals.folder import locate
        from moqa.planning import read_plan
        from moqa.profiling import read_profile
        from moqa.quantization import quantize as run
        from moqa.storage.folders import check_free
        from moqa.training import recover as train
        from moqa.training import trains_whole
        from moqa.training.run import check_training

        if data or held_out or ignore or set_width or any(option is not None for option in (bpw, size, fit, batch)):
            raise MoqaError(
                f"--plan {plan} already contains the texts and the budget",
                "leave out --data, --held-out, --bpw, --size, --fit, --batch, --ignore, --set",
            )
        check_free(out, overwrite)
        check_training(recover, optimizer)
        if nested and recover is not None:
            raise MoqaError(f"--widths-nested {widths_nested} cannot be trained", f"leave out --recover {recover}")
        chosen = read_plan(plan)
        if dry_run:
            measured = read_profile(profile or chosen.profile)
            cost = estimate(
                model,
                chosen,
                measured,
                method=method,
                cache=cache,
                memory=executor.memory(memory),
                before=start_and_end() + _training_seconds(recover),
            )
            print_estimate(cost, chosen, measured, json)
            return
        view = None
        if recover is not None:
            view = open_model(locate(model), keep=False)
            trains_whole(view, executor.memory(memory))  # refuses if it cannot train even one block
        with progress(log_json) as report:
            limited = time_limited(report, time_limit)
            run(
                model, chosen, out, method=method, overwrite=overwrite, report=limited,
                profile=read_profile(profile) if profile else None, cache=cache, memory=memory, restart=restart,
                engine=executor, view=view, widths_nested=nested,
            )  # fmt: skip
            measured = read_profile(profile or chosen.profile)
            if recover is not None:
                train(
                    out, out, length=recover, profile=measured, model=model, overwrite=True, restart=restart, seed=seed,
                    optimizer=optimizer, report=limited, memory=executor.memory(memory),
                )  # fmt: skip
        warn_starved(measured)
        print_checkpoint(out, json)
        return
    if not data:
        raise MoqaError("moqa quantize needs --plan FILE, or --data NAME=SOURCE with --bpw, --size or --fit")
    from moqa.compression.run import compress, forecast
    from moqa.planning import Budget, memory_budget

    check_budgets(bpw, size, fit, None, batch)
    # with --fit, --context is the length of a served conversation
    window = min(context or DEFAULTS.context, DEFAULTS.context) if fit else context or DEFAULTS.context
    settings = CompressOptions(
        strategy=strategy, ties=ties, hedge=hedge,  # type: ignore[arg-type]
        objective=objective, scope=scope, method=method, profile=profile, samples=samples,  # type: ignore[arg-type]
        context=window, self_samples=self_samples, group_size=group_size, symmetric=symmetric, cache=cache, proof=proof,
        overwrite=overwrite, restart=restart, seed=seed, recover=recover, optimizer=optimizer, widths_nested=nested,
        **candidates_of(widths, encodings, groups, floor, ignore, set_width),
    )  # fmt: skip
    budget = memory_budget(model, fit, context=context, batch=batch or 1) if fit else Budget.parse(bpw, size)
    if dry_run:
        expected = forecast(
            model, data, budget, out, held_out=held_out, options=settings, memory=memory, executor=executor,
            before=start_and_end() + _training_seconds(recover),
        )  # fmt: skip
        print_estimate(*expected, json)
        return
    with progress(log_json) as report:
        result = compress(
            model, data, budget, out, held_out=held_out, options=settings, report=time_limited(report, time_limit),
            memory=memory, executor=executor, when_quantized=print_quantized,
        )  # fmt: skip
    if nested:
        print_checkpoint(out, json)
        return
    say_if_uniform(strategy, result.plan)
    print_compressed(result)
    write_result(result.summary(), json)


def _training_seconds(recover: str | None) -> float:
    """Seconds of a training of a given time; a number of steps says nothing of their time."""
    from moqa.training.length import TrainingLength

    if recover is None:
        return 0.0
    length = TrainingLength.parse(recover)
    if length.seconds is None:
        say(f"moqa: warning: the time of --recover {recover} is not part of the estimate", err=True)
    return length.seconds or 0.0


def print_quantized(result: "CompressResult") -> None:
    """Print what is known once the checkpoint is written: experts without data, and how the memory is divided."""
    from moqa.planning import MemoryBudget

    warn_left_out(result.profile.record.left_out)
    warn_starved(result.profile)
    if isinstance(result.budget, MemoryBudget):
        print_fit(result.budget, result.plan.account)


def print_compressed(result: "CompressResult") -> None:
    """Print the proof and the path of the report, or without a proof what was written."""
    if result.proof is None:
        account = result.plan.account
        say(f"{result.checkpoint}: {mib(account.checkpoint)}, {account.bits_per_weight:.3f} bits/weight")
        return
    print_proof(result.proof, result.checkpoint)
    say(f"report: {result.report}")


def print_proof(proof: "Proof", out: Path) -> None:
    """Print our checkpoint and the baselines in one table, and one sentence per distribution that compares them."""
    names = list(proof.ours.distributions)
    rows = []
    for row in filter(None, (proof.original, proof.ours, *proof.baselines)):
        label = str(out) if row is proof.ours else f"{row.strategy or 'original'} {row.bits_per_weight:.2f}"
        cells = [f"{row.distributions[n].kl_divergence:.4f} / {row.distributions[n].perplexity:.3f}" for n in names]
        rows.append([label, mib(row.bytes), f"{row.bits_per_weight:.3f}", *cells])
    headings = ["held-out KL / perplexity", "size", "bits/weight", *names]
    print_table(headings, rows)
    for name in names:
        gain = proof.gain(name)
        side = "below" if gain >= 0 else "ABOVE"
        say(f"{name}: KL divergence {abs(gain):.0%} {side} uniform {proof.ours.method} at the same bytes")
    for loss in proof.lost():
        say(f"moqa: warning: ours loses on {loss}", err=True)


def print_checkpoint(out: Path, json: Path | None) -> None:
    """Print what was written."""
    from moqa.format.reader import open_checkpoint

    checkpoint = open_checkpoint(out, verify=False)
    methods: dict[str, int] = {}
    for unit in checkpoint.manifest.units.values():
        methods[unit.method] = methods.get(unit.method, 0) + 1
    rows = [[
        str(out), mib(checkpoint.bytes), f"{checkpoint.bits_per_weight:.3f}", f"{checkpoint.model_bits_per_weight:.3f}",
        ", ".join(f"{count} {name}" for name, count in sorted(methods.items())),
    ]]  # fmt: skip
    print_table(["checkpoint", "size", "bits/weight", "model bits/weight", "units"], rows)
    if checkpoint.manifest.nested:
        widths = ", ".join(map(str, sorted(checkpoint.manifest.nested)))
        say(f"and {mib(checkpoint.nested_bytes)} by which it is also one of {widths} bits (--width)")
    warn_left_out(checkpoint.manifest.left_out)
    result = {
        "checkpoint": str(out), "bytes": checkpoint.bytes, "bits_per_weight": checkpoint.bits_per_weight,
        "model_bits_per_weight": checkpoint.model_bits_per_weight, "methods": methods,
        "left_out": checkpoint.manifest.left_out, "nested": sorted(checkpoint.manifest.nested),
        "nested_bytes": checkpoint.nested_bytes,
    }  # fmt: skip
    write_result(result, json)
