"""Charts as data: the page's script draws them, in the colours of light or dark mode."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moqa.reports.blocks import Chart, Scale
from moqa.reports.palette import Pair

_DASHES = ("solid", "dash", "dot", "dashdot")
_MISSING = 65535


@dataclass(frozen=True)
class Axis:
    """An axis of a line chart.

    Attributes:
        title: what it shows, with its unit.
        limits: values at its two ends.
        ticks: values with a label and a grid line.
        log: whether it is logarithmic.
    """

    title: str
    limits: tuple[float, float]
    ticks: tuple[float, ...]
    log: bool = False


def heat_map(
    title: str,
    z: NDArray,
    y: Sequence[int],
    hover: str,
    limits: tuple[float, float],
    *,
    scale: str = "sequential",
    axes: tuple[str, str] = ("expert", "layer"),
    more: Sequence[NDArray] = (),
    x: Sequence[str] | None = None,
    height: int | None = None,
    legend: Scale | None = None,
) -> Chart:
    """A heat map: first row on top, every row and column labelled if there is enough space.

    Args:
        title: of the chart.
        z: [rows, columns] values; NaN cells stay empty.
        y: labels of the rows.
        hover: text for a cell, with `{x}`, `{y}` and `{z}`, and `{0}`, `{1}`, ... for `more`; `{z:+.2f}` sets digits
            and sign.
        limits: values at the two ends of the scale.
        scale: `sequential` or `diverging`, see `palette.SCALES`.
        axes: titles of the columns' and the rows' axis.
        more: further tables for `hover`.
        x: labels of the columns; None numbers them.
        height: in pixels; None for one that fits the rows.
        legend: of the scale, if the chart has its own.
    """
    figure = {
        "kind": "heat", "rows": list(y), "columns": list(range(z.shape[1]) if x is None else x), "z": _packed(z),
        "more": [_packed(table) for table in more], "limits": limits, "scale": scale, "titles": axes, "hover": hover,
    }  # fmt: skip
    return Chart(title, figure, height or map_height(len(z)), legend)


def map_height(rows: int) -> int:
    """Height of a heat map in pixels, for a number of rows."""
    return 70 + min(560, max(130, rows * 24 if rows <= 12 else 288 + (rows - 12) * 9))


def _packed(table: NDArray) -> dict[str, Any]:
    """A table as shares of its range in 16 bits: pages of large models stay small, and no hover text shows more."""
    finite = np.isfinite(table)
    low, high = (float(end(table[finite])) if finite.any() else 0.0 for end in (np.min, np.max))
    codes = np.where(finite, (table - low) / ((high - low) or 1.0) * (_MISSING - 1), _MISSING)
    data = np.round(codes).astype("<u2").tobytes()
    return {"low": low, "high": high, "data": base64.b64encode(data).decode()}


def line(
    x: Sequence[float], y: Sequence[float], colour: Pair, hover: Sequence[str], *, dash: str = "solid",
    marker: str | None = None, hollow: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A line with one hover text per point; it is broken where y is not finite."""
    heights = [value if math.isfinite(value) else None for value in y]
    return {
        "x": list(x), "y": heights, "colour": colour, "hover": list(hover), "dash": dash, "marker": marker,
        "hollow": hollow,
    }  # fmt: skip


def line_chart(title: str, lines: Sequence[dict[str, Any]], x: Axis, y: Axis, height: int) -> Chart:
    """Lines on two axes."""
    axes = [
        {"title": axis.title, "limits": axis.limits, "ticks": axis.ticks, "log": axis.log,
         "labels": [f"{tick:g}" for tick in axis.ticks]}
        for axis in (x, y)
    ]  # fmt: skip
    return Chart(title, {"kind": "lines", "lines": list(lines), "axes": axes}, height)


def linear(title: str, values: Sequence[float], *, least: float | None = None, whole: bool = False) -> Axis:
    """A linear axis around values, with about five ticks at round numbers.

    >>> linear("MiB", [10.2, 14.9]).ticks
    (10.0, 11.0, 12.0, 13.0, 14.0, 15.0)

    Args:
        title: of the axis.
        values: that it must show; those that are not finite are ignored.
        least: where it begins; None leaves a small space below the values.
        whole: ticks at integers only.
    """
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    space = (high - low or abs(high) or 1.0) * 0.06
    low, high = low - space if least is None else least, high + space
    step = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 8)
    step = max(round(step), 1) if whole else step
    ticks = np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) * step
    return Axis(title, (low, high), tuple(round(float(tick), 10) for tick in ticks))


def logarithmic(title: str, low: float, high: float) -> Axis:
    """A logarithmic axis with ticks at 1, 2 and 5 of every power of ten, or at all digits if that gives too few.

    >>> logarithmic("nats", 0.004, 0.03).ticks
    (0.005, 0.01, 0.02)
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: tuple[float, ...] = ()
    for digits in ((1, 2, 5), range(1, 10)):
        steps = [float(f"{digit}e{power}") for power in powers for digit in digits]
        if len(ticks) < 2:
            ticks = tuple(step for step in steps if low <= step <= high)
    return Axis(title, (low, high), ticks, log=True)


def dash(index: int, colours: int) -> str:
    """Dash style of a line; changes each time all colours have been used."""
    return _DASHES[(index // colours) % len(_DASHES)]


def upper(values: NDArray, quantile: float = 0.975) -> float:
    """Upper end of a colour scale, chosen so that a few extreme cells do not dominate it."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 1.0
    top = float(np.quantile(finite, quantile)) if finite.size >= 48 else float(finite.max())
    return top if top > 0 else float(finite.max()) or 1.0


def stacked(rows: Sequence[NDArray]) -> NDArray[np.float64]:
    """Rows of different lengths as one table, padded with NaN."""
    width = max(len(row) for row in rows)
    table = np.full((len(rows), width), np.nan)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table
