"""Which variant continues a prompt."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RoutedPrompt:
    """Which variant continues a prompt.

    Attributes:
        variant: its name.
        confidence: of the router, in the variant that it likes best: its probability, times how like the prompt is
            to those of the router's training; None if the variant was asked for.
        likeliest: that variant; another one than `variant` if the confidence is below the threshold.
        problem: why another variant than the chosen one is used; None if it is not.
    """

    variant: str
    confidence: float | None = None
    likeliest: str | None = None
    problem: str | None = None
