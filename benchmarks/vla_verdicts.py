"""What the study says of each hypothesis, by numbers of its rows."""

import re
from collections.abc import Sequence

import numpy as np
from claims import claim
from scipy.stats import spearmanr
from vla_rows import WANTED_SIZES

from moqa.profiling import Profile
from moqa.vla.records import wilson

PARTS = ("vision", "projector", "language", "action")
WIDTHS = (2, 3, 4, 8)


def totals(looped: Sequence[dict]) -> dict[tuple[str, float], tuple[int, int]]:
    """(plan, size) -> successes and episodes of all tasks and seeds."""
    found: dict[tuple[str, float], tuple[int, int]] = {}
    for row in looped:
        before = found.get((row["plan"], row["size"]), (0, 0))
        more = [sum(one[n] for one in row["success"].values()) for n in range(2)]
        found[row["plan"], row["size"]] = before[0] + more[0], before[1] + more[1]
    return found


def sees(rows: Sequence[dict], looped: Sequence[dict], trained: dict) -> str:
    """Whether the original uses its pictures: else nothing follows for alignment.

    Args:
        rows: with those of the original and of its blind control.
        looped: rows of closed loops.
        trained: what the training says of the original (`training.json`).
    """
    original, blind = (next(row for row in rows if row["plan"] == plan) for plan in ("original", "hypothesis-blind"))
    looks = ", ".join(f"{value:.3f} for {kind}" for kind, value in original["looks"].items())
    errors = f"{original['expert_error']:.3f} | {blind['expert_error']:.3f}"
    text = (
        "The control is the same policy made blind: to it, every picture is the average picture of its training.\n\n"
        "| | seeing | blind |\n|---|---:|---:|\n"
        f"| actions against the expert's, held out (RMS) | {errors} |\n"
    )
    found = totals(looped)
    pair = [found.get((plan, 16.0)) for plan in ("original", "hypothesis-blind")]
    if all(pair):
        cells = [f"{successes / episodes:.1%} ({successes}/{episodes})" for successes, episodes in pair]
        text += f"| success | {' | '.join(cells)} |\n"
        lows_and_highs = [wilson(*one) for one in pair]
        apart = lows_and_highs[0][0] > lows_and_highs[1][1]
        text += f"\n**It needs its pictures: {_verdict(apart, pair[0] <= pair[1])}** (beyond the intervals below).\n"
    own, others = (trained[f"held_out_error{end}"] for end in ("", "_with_other_pictures"))
    return text + (
        f"\nOn an eighth of all held-out observations, its actions miss the expert's by {own:.3f} (mean absolute) with "
        f"their own pictures, and by {others:.3f} with those of other episodes of the same task.\n\n"
        "Change of its actions if one kind of input is that of another observation, of another task: "
        f"{looks}.\n"
    )


def targets(looped: Sequence[dict]) -> str:
    """What was wanted of the closed loop, and whether it was met."""
    found = totals(looped)
    rates = {key: successes / episodes for key, (successes, episodes) in found.items()}
    original, aligned = rates.get(("original", 16.0)), rates.get(("aligned", 3.0))
    lines = []
    if original is not None:
        lines.append(claim(original >= 0.7, f"the original succeeds in its episodes: {original:.1%}; wanted 70 %"))
    if original and aligned is not None:
        kept = aligned / original
        lines.append(
            claim(kept >= 0.95, f"aligned at 3 bits keeps of the original's successes: {kept:.1%}; wanted 95 %")
        )
    pairs = {size: (found["aligned", size], found["uniform", size]) for _, size in found if ("aligned", size) in found}
    beats = {size: wilson(*aligned)[0] > wilson(*uniform)[1] for size, (aligned, uniform) in sorted(pairs.items())}
    beyond = {size: beats[size] for size in WANTED_SIZES if size in beats}
    if beyond:
        own = " and ".join(
            f"{rates['aligned', size]:.1%} beside uniform's {rates['uniform', size]:.1%} at {size:g}" for size in beyond
        )
        lines.append(claim(any(beyond.values()), f"aligned beats uniform beyond the intervals: {own}"))
    for size in sorted(beats.keys() - set(WANTED_SIZES)):
        own = [f"{plan} {rates[plan, size]:.1%}" for plan in ("output-error", "aligned", "uniform")]
        simpler = wilson(*found["output-error", size])[0] > wilson(*found["aligned", size])[1]
        where = f"at {size:g}, where the robot fails more often"
        lines += [
            claim(beats[size], f"{where}, aligned beats uniform beyond the intervals: {own[1]}, {own[2]}"),
            claim(simpler, f"{where}, plans by actions alone beat aligned beyond the intervals: {own[0]}, {own[1]}"),
        ]
    return "\n".join(lines) + "\n"


def verdicts(rows: Sequence[dict], profile: Profile) -> str:
    """A section of the page."""
    errors = {row["plan"]: row["action_error"] for row in rows if row["plan"].startswith("hypothesis-")}
    if not errors:
        return "Not run yet.\n"
    section = "\n".join([
        _parts(errors), _language(errors, profile), _projector(errors), _sixteen(errors, rows), _near_head(profile),
    ])  # fmt: skip
    return f"{of_eaqvla(section)}\n\n{section}"


def _parts(errors: dict[str, float]) -> str:
    lines = [
        "Action error if one part alone loses precision, the others keep 16 bits (plain rounding / GPTQ):\n",
        f"| part | {' | '.join(f'{width} bits' for width in WIDTHS)} |", f"|---|{'---:|' * len(WIDTHS)}",
    ]  # fmt: skip
    for part in PARTS:
        cells = [
            " / ".join(f"{_shown(errors, f'hypothesis-only-{part}-{width}-{method}')}" for method in ("rtn", "gptq"))
            for width in WIDTHS
        ]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _language(errors: dict[str, float], profile: Profile) -> str:
    pairs = {
        width: [errors[f"hypothesis-only-{part}-{width}-gptq"] for part in ("language", "vision")]
        for width in _ran(errors, "language-{}-gptq", "vision-{}-gptq")
    }
    more = [width for width, (language, vision) in pairs.items() if language > vision]
    weights = {part: sum(u.weights for u in profile.record.units if u.role == part) for part in PARTS}
    if not pairs:
        return "Language against vision: not run yet.\n"
    tables = profile.statistics[profile.names[0]]
    present = list(dict.fromkeys(unit.role for unit in profile.record.units))
    gradient = dict(zip(present, tables["gradient.parts"].tolist(), strict=True))
    seen, said = tables["gradient.tokens"].tolist()
    ratios = ", ".join(f"{language / vision:.2f} at {width} bits" for width, (language, vision) in pairs.items())
    verdict = _verdict(len(more) == len(pairs), len(more) == 0)
    return (
        f"**Language is more sensitive than vision at equal bits: {verdict}.** Action error of language alone over "
        f"that of vision alone, by GPTQ: {ratios}. (Language has {weights['language'] / weights['vision']:.1f} times "
        f"as many weights.) Gradients of the imitation error: RMS at weights of language {gradient['language']:.2g}, "
        f"of vision {gradient['vision']:.2g}; at embedded words {said:.2g}, at projected tokens {seen:.2g}.\n"
    )


def _projector(errors: dict[str, float]) -> str:
    lines = ["| projector alone | plain rounding | GPTQ, observations | GPTQ, blank pictures |", "|---|---:|---:|---:|"]
    worse, ratios = [], []
    for width in _ran(errors, "projector-{}-rtn", "projector-{}-gptq", "projector-{}-blank"):
        plain, fitted = (errors.get(f"hypothesis-only-projector-{width}-{m}", np.nan) for m in ("rtn", "gptq"))
        blank = errors.get(f"hypothesis-only-projector-{width}-blank", np.nan)
        lines.append(f"| {width} bits | {plain:.4f} | {fitted:.4f} | {blank:.4f} |")
        worse.append(fitted > plain)
        ratios.append(blank / plain)
    if not worse:
        return "GPTQ on the projector: not run yet.\n"
    verdict = _verdict(all(worse), not any(worse))
    return (
        f"**GPTQ on the projector breaks the policy: {verdict} with calibration on observations.** With pictures that "
        "show nothing, which is what a calibration on text alone leaves, its error is "
        f"{min(ratios):.2f} to {max(ratios):.2f} times that of plain rounding.\n\n" + "\n".join(lines) + "\n"
    )


def _sixteen(errors: dict[str, float], rows: Sequence[dict]) -> str:
    found, better = [], []
    for size in (2.5, 3.0):
        kept = errors.get(f"hypothesis-projector-16-{size:g}", np.nan)
        free = next((r["action_error"] for r in rows if r["plan"] == "aligned" and r["size"] == size), np.nan)
        bits = next(
            (r["module_bits"]["projector"] for r in rows if r["plan"] == "aligned" and r["size"] == size), np.nan
        )
        found.append(f"at size {size:g} {kept:.4f} with it, {free:.4f} without (the plan gives it {bits:.1f} bits)")
        better.append(kept < free)
    eight = errors.get("hypothesis-only-projector-8-rtn", np.nan)
    verdict = _verdict(all(better), not any(better))
    return (
        f"**The projector needs 16 bits: {verdict}.** Action error of aligned plans of the same bytes: "
        f"{'; '.join(found)}. At 8 bits, rounded alone, it costs {eight:.4f}.\n"
    )


def _near_head(profile: Profile) -> str:
    tables, column = profile.statistics[profile.names[0]], profile.record.widths.index(3)
    weights = np.array([unit.weights for unit in profile.record.units])
    action = tables["shift.action"][:, column].numpy()
    blocks = np.array([unit.layer for unit in profile.record.units])
    whole, each = spearmanr(blocks, action), spearmanr(blocks, action / weights)
    parts = {
        part: float(sum(a for u, a in zip(profile.record.units, action, strict=True) if u.role == part))
        for part in PARTS
    }
    total = sum(parts.values())
    shares = ", ".join(f"{part} {value / total:.0%}" for part, value in parts.items())
    confirmed = each.statistic > 0 and each.pvalue < 0.05
    refuted = each.statistic < 0 and each.pvalue < 0.05
    return (
        f"**Sensitivity sits near the action head: {_verdict(confirmed, refuted)}.** Rank correlation of a unit's "
        f"block with the shift of the actions at 3 bits: {whole.statistic:+.2f} (p = {whole.pvalue:.2g}); of the "
        f"shift per weight: {each.statistic:+.2f} (p = {each.pvalue:.2g}). Shares of the sum: {shares}.\n"
    )


def _verdict(confirmed: bool, refuted: bool) -> str:
    return "confirmed" if confirmed else "not confirmed" if refuted else "undecided"


def of_eaqvla(section: str) -> str:
    """The claims of EaqVLA, as the bold beginnings of a section's paragraphs say them, each with its first number."""
    form = r"^\*\*(.+?): (confirmed|not confirmed|undecided)(.*?)\.?\*\*.*?(-?\d+\.\d\d+)"
    return "\n".join(
        claim(word == "confirmed", f"{text} ({word}{more}): {number} (arXiv 2505.21567)")
        for text, word, more, number in re.findall(form, section, re.MULTILINE)
    )


def _shown(errors: dict[str, float], name: str) -> str:
    return f"{errors[name]:.4f}" if name in errors else "-"


def _ran(errors: dict[str, float], *names: str) -> list[int]:
    """Widths at which all rows of some names were run."""
    return [width for width in WIDTHS if all(f"hypothesis-only-{name.format(width)}" in errors for name in names)]
