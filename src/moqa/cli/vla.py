"""`moqa vla`: policies of robots, from a profile to what the robot does."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moqa.cli import options
from moqa.cli.app import App, CommandGroup, app
from moqa.cli.common import mib, print_table, say, write_result
from moqa.cli.parse import DEFAULT_ENCODINGS, DEFAULT_WIDTHS, candidates_of
from moqa.cli.progress import LogOption, logged, progress

if TYPE_CHECKING:
    from moqa.planning import Plan
    from moqa.profiling import Profile
    from moqa.vla.records import RolloutRecord

group = App(cls=CommandGroup, no_args_is_help=True, rich_markup_mode=None)
app.add_typer(group, name="vla", help="Give precision to the parts of a robot's policy that its actions need.")

Policy = Annotated[str, typer.Argument(metavar="POLICY", help="folder of the policy")]


@group.command("profile")
@logged
def profile(
    policy: Policy,
    data: Annotated[list[str], typer.Option("--data", metavar="NAME=FOLDER", help="demonstrations; may be repeated")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="profile folder to make")],
    samples: Annotated[int, typer.Option("--samples", min=1, help="observations of each source")] = 64,
    group_size: options.GroupSize = 64,
    seed: Annotated[int, typer.Option("--seed", help="of the choice of observations")] = 0,
    overwrite: options.Overwrite = False,
    restart: options.Restart = False,
    json: options.Json = None,
    log_json: LogOption = None,
) -> None:
    """Measure what losing precision in each unit does to the alignment of vision and language, and to the actions."""
    from moqa.vla import profile_policy

    with progress(log_json) as report:
        result = profile_policy(
            policy, data, out, samples=samples, group_size=group_size, seed=seed, overwrite=overwrite, restart=restart,
            report=report,
        )  # fmt: skip
    print_parts(result)
    write_result(result.record, json)


@group.command("plan")
def plan(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="profile folder")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="plan file to write")],
    bpw: options.Bpw = None,
    size: options.Size = None,
    by: Annotated[
        str, typer.Option("--by", help="output-error (of the actions), aligned (and alignment), random or uniform")
    ] = "output-error",
    alignment: Annotated[
        float | None, typer.Option("--alignment", help="share of alignment in the cost of aligned [default: 0.5]")
    ] = None,
    floor: Annotated[
        list[str] | None,
        typer.Option("--floor", metavar="PART=WIDTH", help="smallest width of a part, e.g. projector=8; repeatable"),
    ] = None,
    ignore: options.Ignore = None,
    set_width: options.SetWidth = None,
    widths: str = DEFAULT_WIDTHS,
    seed: Annotated[int, typer.Option("--seed", help="of a random plan")] = 0,
    json: options.Json = None,
) -> None:
    """Choose a scheme for every unit of a policy."""
    from moqa.planning import Budget, for_file
    from moqa.profiling import read_profile
    from moqa.storage.artifact import write_sealed
    from moqa.vla import plan_policy

    chosen = candidates_of(widths, DEFAULT_ENCODINGS, None, floor, ignore, set_width)
    measured = read_profile(profile)
    result = plan_policy(
        measured, Budget.parse(bpw, size), by=by, alignment=alignment, floors=chosen["floors"],
        fixed=chosen["fixed"], widths=chosen["widths"], seed=seed,
    )  # fmt: skip
    write_sealed(for_file(result, out), out)
    print_widths(result, measured)
    write_result(for_file(result, out), json)


@group.command("quantize")
@logged
def quantize(
    policy: Policy,
    plan: Annotated[Path, typer.Option("--plan", metavar="FILE", help="plan of moqa vla plan")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="checkpoint folder to make")],
    method: options.Method = "gptq",
    overwrite: options.Overwrite = False,
    restart: options.Restart = False,
    log_json: LogOption = None,
) -> None:
    """Apply a plan to a policy and write it as a checkpoint."""
    from moqa.format.reader import open_checkpoint
    from moqa.planning import read_plan
    from moqa.vla import quantize_policy

    with progress(log_json) as report:
        made = quantize_policy(
            policy, read_plan(plan), out, method=method, overwrite=overwrite, restart=restart, report=report
        )
    found = open_checkpoint(made, verify=False)
    say(f"{made}: {found.bits_per_weight:.3f} bits per weight, {mib(found.bytes)}")


@group.command("rollout")
@logged
def rollout(
    policy: Annotated[str, typer.Argument(metavar="POLICY", help="folder of an original or of a checkpoint")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="folder to make")],
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="TASK", help="of MetaWorld; may be repeated [default: all ten]"),
    ] = None,
    episodes: Annotated[int, typer.Option("--episodes", help="of each task")] = 20,
    seed: Annotated[int, typer.Option("--seed", help="decides where things are")] = 0,
    replan: Annotated[
        int | None, typer.Option("--replan", help="actions until the policy is asked again [default: half of a chunk]")
    ] = None,
    processes: Annotated[int, typer.Option("--processes", min=1, help="episodes at the same time")] = 1,
    threads: Annotated[int, typer.Option("--threads", min=1, help="of the policy in each process")] = 1,
    videos: Annotated[bool, typer.Option("--videos/--no-videos", help="film the first episode of each task")] = True,
    overwrite: options.Overwrite = False,
    restart: options.Restart = False,
    json: options.Json = None,
    log_json: LogOption = None,
) -> None:
    """Let a policy move MetaWorld's robot: success rates with intervals, latency and videos."""
    from moqa.vla import rollout as run
    from moqa.vla.environment import TASKS

    with progress(log_json) as report:
        record = run(
            policy, out, tasks=tuple(task or TASKS), episodes=episodes, seed=seed, replan=replan, processes=processes,
            threads=threads, videos=videos, overwrite=overwrite, restart=restart, report=report,
        )  # fmt: skip
    print_rollout(record)
    write_result(record, json)


def print_parts(result: "Profile") -> None:
    """Print what whole parts cost at some widths."""
    from moqa.vla.shifts import PART_WIDTHS, SHIFTS

    parts = list(dict.fromkeys(unit.role for unit in result.record.units))
    for name, tables in result.statistics.items():
        rows = [
            [f"{part} at {width} bits", *(f"{float(tables[f'part.{shift}'][n, column]):.2g}" for shift in SHIFTS)]
            for n, part in enumerate(parts)
            for column, width in enumerate(PART_WIDTHS)
        ]
        print_table([f"shift on {name}", *SHIFTS], rows)


def print_widths(result: "Plan", measured: "Profile") -> None:
    """Print the bytes, and the number of units of each part and width."""
    account = result.account
    say(f"{result.strategy}: {account.bits_per_weight:.3f} bits per weight, {mib(account.checkpoint)}")
    counts = Counter((unit.role, result.units[unit.name].width) for unit in measured.record.units)
    widths, parts = sorted({width for _, width in counts}), list(dict.fromkeys(part for part, _ in counts))
    rows = [[part, *(str(counts[part, width] or "") for width in widths)] for part in parts]
    print_table(["units by width", *map(str, widths)], rows)


def print_rollout(record: "RolloutRecord") -> None:
    """Print success rates."""
    from moqa.vla.records import wilson

    rows = []
    for name, task in record.tasks.items():
        low, high = task.interval
        rows.append([name, f"{task.successes}/{task.episodes}", f"{low:.0%} to {high:.0%}", str(task.crashed or "")])
    low, high = wilson(record.successes, record.episodes)
    rows.append(["all", f"{record.successes}/{record.episodes}", f"{low:.0%} to {high:.0%}", ""])
    print_table(["task", "successes", "95 % interval", "crashed"], rows)
    say(f"{record.milliseconds_per_call:.1f} ms for a call, {record.milliseconds_per_action:.1f} ms for an action")
