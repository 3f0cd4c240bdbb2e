"""Plotly charts as JSON; the page's script replaces the colours in dark mode."""

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from moqa.reports.blocks import Chart, Scale
from moqa.reports.palette import Pair

MAX_TICKS = 32
_DASHES = ("solid", "dash", "dot", "dashdot")


def chart(title: str, traces: Sequence[Any], layout: dict[str, Any], height: int, scale: Scale | None = None) -> Chart:
    """A chart in the style of the page: no decoration, small margins, no legend by default."""
    base: dict[str, Any] = {
        "template": "none", "height": height, "showlegend": False, "margin": {"l": 54, "r": 12, "t": 10, "b": 42},
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "hoverlabel": {"align": "left"},
    }  # fmt: skip
    return Chart(title, str(go.Figure(list(traces), base | layout).to_json()), height, scale)


def heat_map(
    title: str,
    z: NDArray,
    y: Sequence[int],
    hover: str,
    limits: tuple[float, float],
    *,
    scale: str = "sequential",
    axes: tuple[str, str] = ("expert", "layer"),
    customdata: NDArray | None = None,
    x: Sequence[str] | None = None,
    height: int | None = None,
    legend: Scale | None = None,
) -> Chart:
    """A heat map: first row on top, every row and column labelled if there is enough space.

    Args:
        title: of the chart.
        z: [rows, columns] values; NaN cells stay empty.
        y: labels of the rows.
        hover: hover template of plotly for a cell.
        limits: values at the two ends of the scale.
        scale: `sequential` or `diverging`, see `palette.SCALES`.
        axes: titles of the columns' and the rows' axis.
        customdata: [rows, columns, values] for `hover`.
        x: labels of the columns; None numbers them.
        height: in pixels; None for one that fits the rows.
        legend: of the scale, if the chart has its own.
    """
    gap = 1 if max(z.shape) <= MAX_TICKS else 0
    trace = go.Heatmap(
        z=np.asarray(z, dtype=np.float32), y=list(y), x=None if x is None else [escape(name) for name in x],
        customdata=customdata, hovertemplate=hover + "<extra></extra>", zmin=limits[0], zmax=limits[1],
        xgap=gap, ygap=gap, showscale=False, meta=scale, hoverongaps=False, xaxis="x", yaxis="y",
    )  # fmt: skip
    shared = {"showgrid": False, "zeroline": False, "ticks": "", "automargin": True}
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": axes[0], "standoff": 6}, **shared},
        "yaxis": {"title": {"text": axes[1], "standoff": 8}, "autorange": "reversed", **shared},
    }
    for axis, length in zip(("yaxis", "xaxis"), z.shape, strict=True):
        if length <= MAX_TICKS // 2:
            layout[axis]["dtick"] = 1
    return chart(title, [trace], layout, height or map_height(len(z)), legend)


def map_height(rows: int) -> int:
    """Height of a heat map in pixels, for a number of rows."""
    return 70 + min(560, max(130, rows * 24 if rows <= 12 else 288 + (rows - 12) * 9))


def line(x: Sequence[float], y: Sequence[float], name: str, colour: Pair, hover: str, **more: Any) -> Any:
    """A line with a hover text; `more` is passed to plotly."""
    style = {"color": colour[0], "width": 2} | more.pop("line", {})
    return go.Scatter(
        x=list(x), y=list(y), name=escape(name), line=style, hovertemplate=hover + "<extra></extra>", **more
    )


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


def escape(text: str) -> str:
    """Escape a user's string for plotly, which interprets some HTML in texts."""
    return html.escape(text, quote=False)


def braces(text: str) -> str:
    """Escape a user's string for a hover template, in which `%{` would start a variable."""
    return escape(text).replace("%{", "%&#123;")
