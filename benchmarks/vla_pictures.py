"""Pictures of the study of policies, as SVG."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from moqa.profiling import Profile
from moqa.vla.records import wilson

COLOURS = {
    "original": "#555555", "hypothesis-blind": "#bbbbbb", "uniform": "#d95f02", "output-error": "#1b9e77",
    "aligned": "#7570b3", "random": "#999999",
}  # fmt: skip
PARTS = {"vision": "#4e79a7", "projector": "#e15759", "language": "#59a14f", "action": "#b07aa1"}
_HEAD = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" font-family="sans-serif" font-size="12">'

BITS = (1, 2, 3, 4, 6, 8)  # on the axis of bits per weight


def error_curves(rows: Sequence[dict]) -> str:
    """Action error against bits per weight, both logarithmic."""
    width, height, left, top, bottom = 720, 380, 70, 20, 330
    lines: dict[str, list[tuple[float, float]]] = {}
    for plan in ("random", "uniform", "output-error", "aligned"):
        for size in sorted({row["size"] for row in rows if row["plan"] == plan}):
            some = [row for row in rows if row["plan"] == plan and row["size"] == size]
            error = float(np.mean([row["action_error"] for row in some]))
            lines.setdefault(plan, []).append((float(np.mean([row["bits"] for row in some])), error))
    points = [point for line in lines.values() for point in line]
    if not points:
        return _framed(width, height, [])
    low, high = (end(error for _, error in points) for end in (min, max))

    def place(bits: float, error: float) -> tuple[float, float]:
        x = left + (width - left - 120) * math.log(bits / BITS[0]) / math.log(BITS[-1] / BITS[0])
        y = bottom - (bottom - top) * (math.log(error) - math.log(low / 1.2)) / math.log(high / low * 1.44)
        return x, y

    parts = []
    for bits in BITS:
        x, _ = place(bits, low)
        parts.append(f'<line x1="{x:.0f}" x2="{x:.0f}" y1="{top}" y2="{bottom}" stroke="#dddddd"/>')
        parts.append(f'<text x="{x:.0f}" y="{bottom + 18}" text-anchor="middle">{bits}</text>')
    for tick in _decades(low / 1.2, high * 1.2):
        _, y = place(BITS[0], tick)
        parts.append(f'<line x1="{left}" x2="{width - 120}" y1="{y:.0f}" y2="{y:.0f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{tick:g}</text>')
    for number, (plan, line) in enumerate(lines.items()):
        places = [place(*point) for point in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[plan]}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{COLOURS[plan]}"/>' for x, y in places]
        y = top + 20 + 18 * number
        parts.append(f'<text x="{width - 110}" y="{y}" fill="{COLOURS[plan]}">{plan}</text>')
    parts.append(f'<text x="{(left + width - 120) / 2}" y="{bottom + 40}" text-anchor="middle">bits per weight</text>')
    parts.append(
        f'<text transform="translate(16 {(top + bottom) / 2}) rotate(-90)" text-anchor="middle">action error</text>'
    )
    return _framed(width, height, parts)


def sensitivities(profile: Profile) -> str:
    """Bars of every unit at 3 bits, one row for each shift."""
    units = profile.record.units
    tables = profile.statistics[profile.names[0]]
    column = profile.record.widths.index(3)
    width, left, row_height, top = 900, 90, 84, 24
    step = (width - left - 20) / len(units)
    parts = []
    for row, shift in enumerate(("module", "token", "layer", "action")):
        values = np.sqrt(tables[f"shift.{shift}"][:, column].numpy())
        base = top + (row + 1) * row_height - 14
        parts.append(f'<text x="{left - 8}" y="{base - 24}" text-anchor="end">{shift}</text>')
        for number, (unit, value) in enumerate(zip(units, values / max(values.max(), 1e-12), strict=True)):
            tall = (row_height - 24) * float(value)
            parts.append(
                f'<rect x="{left + number * step:.1f}" y="{base - tall:.1f}" width="{step * 0.8:.1f}" '
                f'height="{tall:.1f}" '
                f'fill="{PARTS[unit.role]}"><title>{unit.name}: {value:.2f}</title></rect>'
            )
    for number, (part, colour) in enumerate(PARTS.items()):
        parts.append(f'<text x="{left + 110 * number}" y="14" fill="{colour}">{part}</text>')
    return _framed(width, top + 4 * row_height + 6, parts)


def success_bars(totals: Mapping[tuple[str, float], tuple[int, int]]) -> str:
    """Success rates with their intervals."""
    width, left, step = 720, 170, 30
    parts = []
    for number, ((plan, size), (successes, episodes)) in enumerate(totals.items()):
        y, scale = 24 + number * step, width - left - 60
        low, high = wilson(successes, episodes)
        rate = successes / episodes
        label = {"original": plan, "hypothesis-blind": "original, blind"}.get(plan, f"{plan}, {size:g} bits")
        parts.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{label}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{scale * rate:.1f}" height="16" fill="{COLOURS[plan]}"/>')
        ends = left + scale * low, left + scale * high
        parts.append(f'<line x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y + 8}" y2="{y + 8}" stroke="black"/>')
        parts += [f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y + 4}" y2="{y + 12}" stroke="black"/>' for x in ends]
        parts.append(f'<text x="{ends[1] + 6:.1f}" y="{y + 12}">{rate:.0%}</text>')
    return _framed(width, 36 + len(totals) * step, parts)


def _decades(low: float, high: float) -> list[float]:
    ticks = [factor * 10.0**power for power in range(-6, 3) for factor in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def _framed(width: int, height: int, parts: Sequence[str]) -> str:
    return (
        f'{_HEAD.format(width, height)}<rect width="{width}" height="{height}" fill="white"/>{"".join(parts)}</svg>\n'
    )
