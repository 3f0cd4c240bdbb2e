"""Elements of a page: the sections fill them with data, and the template draws each kind."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moqa.reports.palette import Pair


class PageElement:
    """What the template draws, each kind in its own way."""

    @property
    def kind(self) -> str:
        """Name of the class."""
        return type(self).__name__


@dataclass(frozen=True)
class Scale:
    """Legend of a colour scale: the meaning of its two ends."""

    name: str
    low: str
    high: str
    title: str = ""


@dataclass(frozen=True)
class Chart(PageElement):
    """One chart: its data, see `charts`, which the page's script draws."""

    title: str
    figure: dict[str, Any]
    height: int
    scale: Scale | None = None


@dataclass(frozen=True)
class CellGrid(PageElement):
    """Charts side by side with one legend; `lead` gives the first one more space."""

    charts: tuple[Chart, ...]
    scale: Scale | None = None
    lead: bool = False


@dataclass(frozen=True)
class Picker(PageElement):
    """Several alternatives, of which the reader picks one to show."""

    label: str
    options: tuple[tuple[str, tuple[PageElement, ...]], ...]


@dataclass(frozen=True)
class Table(PageElement):
    """A plain table; `words` are the columns that do not hold numbers."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Note(PageElement):
    """A paragraph between charts."""

    text: str
    title: str = ""


@dataclass(frozen=True)
class KeyEntry:
    """A colour or marker and its meaning."""

    label: str
    colour: Pair
    hollow: bool = False
    shape: str = "circle"


@dataclass(frozen=True)
class Key(PageElement):
    """Legend of lines or bar segments."""

    entries: tuple[KeyEntry, ...]


@dataclass(frozen=True)
class Cell:
    """A number with a smaller one below it."""

    main: str
    minor: str = ""
    best: bool = False


@dataclass(frozen=True)
class QualityRow:
    """A model in the quality table; `made` says by which method and hedge."""

    name: str
    made: str
    known: tuple[Cell, ...]
    novel: tuple[Cell, ...]
    sizes: tuple[Cell, ...]
    colour: Pair
    tip: str


@dataclass(frozen=True)
class QualityTable(PageElement):
    """Table of sizes and qualities, with rows grouped by size."""

    known: tuple[str, ...]
    novel: tuple[str, ...]
    groups: tuple[tuple[str, tuple[QualityRow, ...]], ...]


@dataclass(frozen=True)
class BarPart:
    """A segment of a bar."""

    label: str
    share: float
    colour: Pair


@dataclass(frozen=True)
class Bars(PageElement):
    """Stacked bars; the shares of the longest bar add up to 1."""

    title: str
    rows: tuple[tuple[str, tuple[BarPart, ...]], ...]


@dataclass(frozen=True)
class Section:
    """A section of the page, with its entry in the navigation."""

    nav: str
    title: str
    reading: str
    blocks: Sequence[PageElement]


def number(value: float | None, digits: int = 2) -> str:
    """Format a number for a table; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return "\u2014"
    return f"{value:.{digits}f}".replace("-", "\u2212")


def percent(value: float | None, digits: int = 1) -> str:
    """Format a share as a percentage for a table; a dash for None and NaN."""
    return "\u2014" if value is None or math.isnan(value) else f"{number(value * 100, digits)} %"


def signed(change: float | None, digits: int = 0) -> str:
    """Format a relative change in percent with its sign; a dash for None."""
    return number(None) if change is None else f"{'+' if change > 0 else ''}{number(change * 100, digits)} %"
