"""The page of the study of policies: tables, pictures and one short video for each plan."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from vla_pictures import error_curves, sensitivities, success_bars
from vla_rows import PARTS, POLICY, SIZES
from vla_verdicts import sees, targets, totals, verdicts

from moqa.profiling import Profile
from moqa.vla.records import wilson
from moqa.vla.shifts import PART_WIDTHS

PAGE = Path("docs/results/vla.md")
ROLLOUTS = Path("runs/vla/rollouts")
FILMED = "button-press-topdown"
ORDER = ("uniform", "output-error", "aligned", "random")

_INTRO = """# Policies

Command: `make vla-study` (`benchmarks/vla_study.py`). The reference's policy (`reference/policy`: {values:,} values;
ten tasks of MetaWorld, one camera) in mixed precision. The profile is fitted on {samples} observations of the
demonstrations' calibration split; errors are measured on 200 observations of held-out episodes; no demonstration has
the seeds of the rollouts.
All plans of a size have at most the bytes of its uniform plan (1 and 2 bits in groups of 64, and 3, 4 and 6 bits in
groups of up to 256), all are quantized by GPTQ with observations as calibration, and all run packed. `aligned` costs a
unit by alignment and action error, half each; `output-error` by action error alone: the same solver, candidates and
profile.
EaqVLA's authors asked for its retraction, so its claims are hypotheses here; the formulas are ours
([method](../methods/vla.md)).
"""


def write_page(looped: Sequence[dict], rows: Sequence[dict], fast: dict, profile: Profile) -> None:
    original = next(row for row in rows if row["plan"] == "original")
    settings, trained = profile.record.settings, json.loads((POLICY / "training.json").read_text())
    parts = [
        _INTRO.format(values=original["weights"], samples=settings.samples),
        "## Does it look?\n", sees(rows, looped, trained), "\n## By action error\n", _errors(rows),
        "\n![Action error against bits](vla-error.svg)\n",
        _modules(rows), "\n## What the robot does\n", _success(looped), _videos(),
        "\n## Where it is sensitive\n", _parts(profile), _sensitivity_text(),
        "![Shifts by unit](vla-sensitivity.svg)\n",
        "\n## Hypotheses\n", verdicts(rows, profile), "\n## Speed\n", _speed(fast, rows),
    ]  # fmt: skip
    PAGE.with_name("vla-error.svg").write_text(error_curves(rows))
    PAGE.with_name("vla-sensitivity.svg").write_text(sensitivities(profile))
    if looped:
        PAGE.with_name("vla-success.svg").write_text(success_bars(totals(looped)))
    PAGE.write_text("\n".join(parts))


def _errors(rows: Sequence[dict]) -> str:
    ratios: list[float] = []
    lines = [
        "Root mean square length of the change of an action (an action has 4 numbers between -1 and 1).\n",
        "| size | bytes | bits | uniform | output-error | aligned | random | aligned / output-error |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for size in sorted({row["size"] for row in rows if row["plan"] == "uniform"}):
        some = {plan: [r for r in rows if r["plan"] == plan and r["size"] == size] for plan in ORDER}
        if not all(some.values()):
            continue
        errors = {plan: np.mean([row["action_error"] for row in found]) for plan, found in some.items()}
        cells = " | ".join(f"{errors[plan]:.4f}" for plan in ORDER)
        uniform = some["uniform"][0]
        ratio = errors["aligned"] / errors["output-error"]
        ratios.append(ratio)
        lines.append(f"| {size:g} | {uniform['bytes']:,} | {uniform['bits']:.2f} | {cells} | {ratio:.2f} |")
    if len(ratios) < len(SIZES):
        lines.append(f"\n{len(ratios)} of {len(SIZES)} sizes so far.")
    if ratios and min(ratios) > 1:
        lines.append(
            "\nAlignment adds nothing over the error of the actions here: at every size, the plan that is fitted to "
            "actions alone changes them less."
        )
    return "\n".join(lines) + "\n"


def _modules(rows: Sequence[dict]) -> str:
    lines = [
        "Stored bits per weight of each part:\n", "| plan | size | vision | projector | language | action |",
        "|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in rows:
        if row["plan"] in ORDER[:3] and row["size"] in (2.5, 3.0):
            bits = " | ".join(f"{value:.2f}" for value in map(row["module_bits"].get, PARTS))
            lines.append(f"| {row['plan']} | {row['size']:g} | {bits} |")
    return "\n".join(lines) + "\n"


def _success(looped: Sequence[dict]) -> str:
    if not looped:
        return "Not run yet.\n"
    tasks = list(looped[0]["success"])
    lines = [
        "![Success rates](vla-success.svg)\n",
        "Successes of all tasks, with 95 % intervals (Wilson), and by task:\n",
        f"| plan | size | all | 95 % | {' | '.join(tasks)} |", f"|---|---:|---:|---|{'---:|' * len(tasks)}",
    ]  # fmt: skip
    for (plan, size), (successes, episodes) in totals(looped).items():
        some = [row for row in looped if (row["plan"], row["size"]) == (plan, size)]
        cells = [
            f"{sum(r['success'][task][0] for r in some)}/{sum(r['success'][task][1] for r in some)}" for task in tasks
        ]
        low, high = wilson(successes, episodes)
        share = f"{successes / episodes:.1%} ({successes}/{episodes})"
        lines.append(f"| {plan} | {size:g} | {share} | {low:.1%} to {high:.1%} | {' | '.join(cells)} |")
    seeds = sorted({row["seed"] for row in looped})
    crashed = sum(row.get("crashed", 0) for row in looped)
    each = totals(looped)["original", 16.0][1] // len(tasks) // len(seeds)
    lines.append(
        f"\nSeeds {', '.join(map(str, seeds))}; {each} episodes of each task and seed (the study's default is 20, with "
        f"three seeds), one seed where a plan has fewer; {crashed} episodes ended in a crash of the environment.\n"
    )
    lines.append(targets(looped))
    return "\n".join(lines)


def _videos() -> str:
    lines = []
    for plan in ("original", "hypothesis-blind", "uniform-2.5", "output-error-2.5", "aligned-2.5"):
        film = ROLLOUTS / f"{plan}-0" / f"{FILMED}.gif"
        if film.exists():
            shutil.copyfile(film, PAGE.with_name(f"vla-{plan}.gif"))
            lines.append(f"| {plan} | ![{plan}](vla-{plan}.gif) |")
    if not lines:
        return ""
    return "\n".join([f"The first episode of {FILMED}:\n", "| plan | |", "|---|---|", *lines]) + "\n"


def _parts(profile: Profile) -> str:
    """What whole parts cost, from the profile."""
    tables, parts = profile.statistics[profile.names[0]], list(dict.fromkeys(u.role for u in profile.record.units))
    lines = [
        "Whole parts by plain rounding, all others exact, on the profile's observations: 1 - CKA of the projected "
        "tokens / action error.\n",
        f"| part | {' | '.join(f'{width} bits' for width in PART_WIDTHS)} |", f"|---|{'---:|' * len(PART_WIDTHS)}",
    ]  # fmt: skip
    for number, part in enumerate(parts):
        pairs = zip(tables["part.module"][number].tolist(), tables["part.action"][number].sqrt().tolist(), strict=True)
        lines.append(f"| {part} | {' | '.join(f'{module:.4f} / {action:.4f}' for module, action in pairs)} |")
    return "\n".join(lines) + "\n"


def _sensitivity_text() -> str:
    return (
        "Each bar is a unit at 3 bits, in the order in which an observation passes them, as a share of the largest.\n"
    )


def _speed(fast: dict, rows: Sequence[dict]) -> str:
    if not fast:
        return "Not measured yet.\n"
    lines = [
        "One call of the policy: one observation in, eight actions out. The fastest of 300 calls, each policy in a "
        "process of its own; other work ran on the machine, so most calls waited for it. Memory is above that of the "
        "process before it reads the policy.\n",
        "| policy | bytes | ms, 1 thread | of these in products | ms, 2 threads | peak memory, MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    sizes = {f"{row['plan']}-{row['size']:g}": row["bytes"] for row in rows} | {
        row["plan"]: row["bytes"] for row in rows if row["plan"] == "original"
    }
    for name, (one, two) in fast.items():
        lines.append(
            f"| {name} | {sizes[name]:,} | {one['milliseconds']:.2f} | {one['of_products']:.2f} "
            f"| {two['milliseconds']:.2f} | {one['above_start_bytes'] / 2**20:.0f} |"
        )
    whole, packed = fast["original"], fast["aligned-3"]
    faster = whole[0]["milliseconds"] / packed[0]["milliseconds"]
    lines.append(
        f"\nOn one thread, the packed policy is {faster:.2f} times as fast as the original in float32. Its "
        f"{packed[0]['products']} products take {packed[0]['of_products']:.2f} ms (the original's "
        f"{whole[0]['of_products']:.2f}), {packed[0]['of_convolutions']:.2f} of these in the three convolutions, whose "
        "patches are copied first; the rest is what both do alike (norms, attention, Python)."
    )
    if packed[1]["milliseconds"] > packed[0]["milliseconds"]:
        lines.append(
            "Two threads are slower than one: a product of 20 rows takes about as long as waking a thread, and where "
            "other work has both cores, the first thread waits for the second. `moqa vla rollout` uses one."
        )
    return "\n".join(lines) + "\n"
