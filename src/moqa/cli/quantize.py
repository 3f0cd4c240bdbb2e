"""`moqa quantize`: apply a plan, or do the whole job from texts and a size."""

from pathlib import Path
from typing import Annotated

import typer

from moqa.cli.app import app
from moqa.cli.common import (
    AddressOption,
    BpwOption,
    EngineOption,
    GroupOption,
    HedgeOption,
    JsonOption,
    MethodOption,
    ObjectiveOption,
    OverwriteOption,
    SamplesOption,
    ScopeOption,
    SeedOption,
    SelfSamplesOption,
    SizeOption,
    StrategyOption,
    SymmetricOption,
    TiesOption,
    WidthsOption,
    mib,
    print_table,
    start_and_end,
    widths_of,
    write_result,
)  # fmt: skip
from moqa.cli.plan import BatchOption, FitOption, check_budgets, print_estimate
from moqa.cli.profile import warn_starved
from moqa.cli.progress import LogOption, logged, progress
from moqa.cli.progress.limits import MemoryOption, RestartOption, TimeOption, time_limited
from moqa.errors import MoqaError


@app.command()
@logged
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="folder or Hub id of the original model")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="checkpoint folder to make")],
    plan: Annotated[Path | None, typer.Option("--plan", help="apply this plan; else --data and a budget")] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="NAME=SOURCE", help="texts the model will see")
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option("--held-out", metavar="NAME=SOURCE", help="texts for the proof [default: a fifth of --data]"),
    ] = None,
    bpw: BpwOption = None,
    size: SizeOption = None,
    fit: FitOption = None,
    batch: BatchOption = None,
    strategy: StrategyOption = "moqa-budget",
    ties: TiesOption = "unit",
    method: MethodOption = "gptq",
    widths: WidthsOption = "2,3,4,5,6,8",
    hedge: HedgeOption = None,
    objective: ObjectiveOption = "mean",
    scope: ScopeOption = "global",
    profile: Annotated[
        Path | None, typer.Option("--profile", help="profile folder to reuse or make [default: OUT.profile]")
    ] = None,
    samples: SamplesOption = 64,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=2,
            help="tokens in a window [default: 256]; with --fit: of a served conversation [default: 8192, or the "
            "model's], windows then have as many but at most 256",
        ),
    ] = None,
    self_samples: SelfSamplesOption = None,
    group_size: GroupOption = 64,
    symmetric: SymmetricOption = False,
    cache: Annotated[
        str | None,
        typer.Option("--cache", metavar="SHARE", help="keep for `moqa adjust`: 1% of the channels, or full"),
    ] = None,
    proof: Annotated[
        bool, typer.Option("--proof/--no-proof", help="evaluate beside plain plans on held-out text")
    ] = True,
    overwrite: OverwriteOption = False,
    seed: SeedOption = 0,
    max_memory: MemoryOption = None,
    time_limit: TimeOption = None,
    restart: RestartOption = False,
    engine: EngineOption = "local",
    ray_address: AddressOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what it costs in bytes, memory, disk and time, and do nothing")
    ] = False,
    json: JsonOption = None,
    log_json: LogOption = None,
) -> None:
    """Quantize a model: from a plan, or from the texts it will see and a size, with proof on held-out text."""
    from moqa.cli.oneshot import Wish, fulfil, unproven
    from moqa.execution import find_executor
    from moqa.memory.limit import MemoryLimit
    from moqa.methods.registry import find_method
    from moqa.quantization import quantize as run
    from moqa.quantization.cache import parse_cache
    from moqa.storage.folders import check_free

    find_method(method)
    if cache is not None:
        parse_cache(cache)
    memory = MemoryLimit.parse(max_memory) if max_memory else None
    where = find_executor(engine, address=ray_address)
    if plan is not None or not (proof and unproven(out)):
        check_free(out, overwrite)
    if plan is not None:
        if data or held_out or any(option is not None for option in (bpw, size, fit, batch)):
            raise MoqaError(
                f"--plan {plan} already holds texts and budget",
                "leave out --data, --held-out, --bpw, --size, --fit, --batch",
            )
        from moqa.planning import read_plan
        from moqa.profiling import read_profile

        chosen = read_plan(plan)
        if dry_run:
            from moqa.quantization.estimate import estimate

            measured = read_profile(profile or chosen.profile)
            cost = estimate(
                model, chosen, measured, method=method, cache=cache, memory=where.memory(memory), before=start_and_end()
            )
            print_estimate(cost, chosen, measured, json)
            return
        with progress(log_json) as report:
            known = read_profile(profile) if profile else None
            run(
                model, chosen, out, method=method, overwrite=overwrite, report=time_limited(report, time_limit), profile=known, cache=cache,
                memory=memory, restart=restart, engine=where,
            )  # fmt: skip
        warn_starved(read_profile(profile or chosen.profile))
        print_checkpoint(out, json)
        return
    if not data:
        raise MoqaError("moqa quantize needs --plan FILE, or --data NAME=SOURCE with --bpw, --size or --fit")
    check_budgets(bpw, size, fit, None, batch)
    fulfil(
        Wish(
            model=model, out=out, data=data, held_out=held_out or [], bpw=bpw, size=size, fit=fit, batch=batch or 1,
            strategy=strategy, ties=ties, method=method, widths=widths_of(widths), hedge=hedge, objective=objective,
            scope=scope, profile=profile or out.with_name(out.name + ".profile"), samples=samples, context=context,
            self_samples=self_samples, group_size=group_size, symmetric=symmetric, cache=cache, proof=proof,
            overwrite=overwrite, seed=seed, dry_run=dry_run, memory=memory, time_limit=time_limit, restart=restart,
            engine=where, json=json, log_json=log_json,
        )
    )  # fmt: skip


def print_checkpoint(out: Path, json: Path | None) -> None:
    """What was written."""
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
    result = {
        "checkpoint": str(out), "bytes": checkpoint.bytes, "bits_per_weight": checkpoint.bits_per_weight,
        "model_bits_per_weight": checkpoint.model_bits_per_weight, "methods": methods,
    }  # fmt: skip
    write_result(result, json)
