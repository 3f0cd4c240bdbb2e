"""Colours as pairs for light and dark mode; distinguishable with all common kinds of colour blindness."""

Pair = tuple[str, str]

KNOWN: Pair = ("#2c65ad", "#86b6f2")
NOVEL: Pair = ("#c0561a", "#f3a86b")
TEXT: Pair = ("#20252b", "#e4e7eb")
MUTED: Pair = ("#67707c", "#98a2ae")

STRATEGIES: dict[str, Pair] = {
    "budget": ("#00796b", "#4bd0b6"),
    "paper": ("#8b3a8f", "#d996dc"),
    "paper-v1": ("#ab8500", "#e2bf4d"),
    "uniform": ("#5b6673", "#a8b3bf"),
    "frequency": ("#9a6540", "#d4a583"),
    "random": ("#9aa3ad", "#737d88"),
    "original": ("#20252b", "#e4e7eb"),
}
LINES: tuple[Pair, ...] = (
    ("#00796b", "#4bd0b6"),
    ("#8b3a8f", "#d996dc"),
    ("#ab8500", "#e2bf4d"),
    ("#b03a4f", "#f08c9e"),
    ("#4c5b9e", "#a3b1f0"),
    ("#9a6540", "#d4a583"),
)
# one shade per width, so that narrow and wide units are easy to distinguish
WIDTHS: dict[int, Pair] = {
    1: ("#dfe7ef", "#25303b"),
    2: ("#c3d5e6", "#2b4258"),
    3: ("#9ebfdb", "#305a80"),
    4: ("#6fa3cb", "#3a77a8"),
    5: ("#4685b6", "#5594c6"),
    6: ("#2a689d", "#7ab2dd"),
    7: ("#174d80", "#a3cdec"),
    8: ("#0b3561", "#cfe6f8"),
    16: ("#061a33", "#f2f8fd"),
}
SCALES: dict[str, tuple[list[str], list[str]]] = {
    "sequential": (
        ["#f1f5f8", "#b7d0e4", "#639dc9", "#22639d", "#08264f"],
        ["#1d242c", "#21415f", "#2f74a8", "#74b4de", "#e2f2ff"],
    ),
    "diverging": (
        ["#8a3a0c", "#de935f", "#f4f4f2", "#83b1d8", "#1d4f88"],
        ["#ffb681", "#a85c2c", "#20262d", "#3176ad", "#aad5ff"],
    ),
}


def strategy_colour(name: str) -> Pair:
    """Colour of a strategy; an unknown strategy always gets the same one of the other colours."""
    if name in STRATEGIES:
        return STRATEGIES[name]
    free = [pair for pair in LINES if pair not in STRATEGIES.values()]
    return free[sum(name.encode()) % len(free)]
