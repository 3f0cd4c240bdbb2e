"""Metrics of the server, for Prometheus."""

from collections.abc import Callable, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from moqa.adjustment.drift import STATES, State
from moqa.mixture.route import RoutedPrompt

_FIRST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_CONFIDENCE_BUCKETS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
_NEXT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class RequestMetrics:
    """Metrics of one server in their own registry, whatever it answers.

    >>> metrics = RequestMetrics()
    >>> metrics.requests.labels("/v1/models", 200).inc()
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("moqa_requests", "answered requests", ("route", "status"), registry=self.registry)

    def route(self, variants: Sequence[str], what: str = "texts") -> None:
        """Add metrics of a mixture.

        Args:
            variants: all that there are.
            what: is answered by a variant each.
        """
        counter, histogram = partial(Counter, registry=self.registry), partial(Histogram, registry=self.registry)
        self.routed = counter(f"moqa_routed_{what}", f"{what} by the variant that answers them", ("variant",))
        for name in variants:
            self.routed.labels(name)
        self.confidence = histogram("moqa_route_confidence", "of the router in its choice", buckets=_CONFIDENCE_BUCKETS)
        self.damaged = counter(
            "moqa_variant_failures", f"{what} whose variant was damaged, so that another one answered them"
        )

    def count(self, route: RoutedPrompt) -> None:
        """Count what a mixture's router, or a request, has chosen."""
        self.routed.labels(route.variant).inc()
        if route.problem is not None:
            self.damaged.inc()
        if route.confidence is not None:
            self.confidence.observe(route.confidence)

    def page(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class ImageMetrics(RequestMetrics):
    """Metrics of a server that classifies images."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = Gauge("moqa_queue_length", "images that wait", registry=self.registry)
        self.seconds = Histogram(
            "moqa_image_seconds", "of work on one image, routing included", buckets=_NEXT_BUCKETS,
            registry=self.registry,
        )  # fmt: skip


class Metrics(RequestMetrics):
    """Metrics of a server that writes texts."""

    def __init__(self) -> None:
        super().__init__()
        registry = self.registry
        counter, gauge = partial(Counter, registry=registry), partial(Gauge, registry=registry)
        histogram = partial(Histogram, registry=registry)
        self.prompt_tokens = counter("moqa_prompt_tokens", "tokens of prompts that were read")
        self.completion_tokens = counter("moqa_completion_tokens", "tokens that were written")
        self.waiting = gauge("moqa_queue_length", "texts that wait for a slot")
        self.active = gauge("moqa_active_slots", "texts that are being written")
        self.slots = gauge("moqa_slots", "texts that can be written at once")
        self.first_token = histogram(
            "moqa_time_to_first_token_seconds", "from request to first token, waiting included", buckets=_FIRST_BUCKETS
        )
        self.next_token = histogram(
            "moqa_time_per_token_seconds", "from one token of a text to its next", buckets=_NEXT_BUCKETS
        )
        self.seconds = counter("moqa_busy_seconds", "time that the model worked", ("phase",))
        for phase in ("prefill", "decode"):
            self.seconds.labels(phase)

        self.adjustments = gauge("moqa_adjustments", "adjustments that are held")
        self.adjusted = counter(
            "moqa_adjusted_requests", "requests by the adjustment they are written with", ("adjustment",)
        )
        self.adjustment_seconds = gauge("moqa_adjustment_seconds", "time that the last one took")
        self.failures = counter("moqa_adjustment_failures", "adjustments that could not be made")

    def watch(self, state: Callable[[], State], divergence: Callable[[], float]) -> None:
        """Add metrics of a drift detector."""
        shown = Gauge("moqa_drift_state", "0 known, 1 drifting, 2 novel", registry=self.registry)
        shown.set_function(lambda: STATES.index(state()))
        bits = Gauge("moqa_drift_divergence_bits", "routing, from known distributions", registry=self.registry)
        bits.set_function(divergence)
