"""The variants of a mixture: each text gets the one that its request names, or that the router chooses."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moqa.generation import Piece
from moqa.mixture.load import Mixture
from moqa.mixture.route import RoutedPrompt
from moqa.serve.adjusting import Adjusting, before_each
from moqa.serve.metrics import Metrics
from moqa.serve.refusal import RefusalError
from moqa.serve.text import Chosen, ServedText

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RoutedVariants(Adjusting):
    """A mixture that is served; only the scheduler's thread chooses and switches.

    >>> routed = RoutedVariants(mixture, Metrics())  # doctest: +SKIP
    >>> routed.variants  # doctest: +SKIP
    ['base', 'german']

    A variant whose files were changed since the server began is not used: another one answers, and responses say so.

    Args:
        mixture: that is served.
        metrics: metrics of the server.
    """

    def __init__(self, mixture: Mixture, metrics: Metrics) -> None:
        super().__init__(mixture.use(mixture.record.default), metrics)
        self._mixture, self._active = mixture, Counter[str]()
        metrics.route(mixture.names)

    @property
    def variants(self) -> Sequence[str]:
        """See `Adjusting`."""
        return self._mixture.names

    def choose(self, asked: str | None, explicit: bool, client: str | None) -> Chosen:  # noqa: ARG002
        """See `Adjusting`; which variant it is, is chosen when its text begins.

        Raises:
            RefusalError: 400 if an adjustment is asked for.
        """
        if asked is not None:
            names = ", ".join(self.variants)
            raise RefusalError(400, f"a mixture has variants: give variant, one of {names}", param="adjustment")
        return Chosen()

    def note(self, chosen: Chosen) -> None:
        """See `Adjusting`; texts are counted when they begin."""

    def model(self, job: ServedText) -> "PreTrainedModel":
        """Choose the variant of a text that begins."""
        chosen, mixture = job.chosen, self._mixture
        asked = RoutedPrompt(chosen.name) if chosen.name is not None else mixture.choose(job.ids)
        route = mixture.checked(asked)
        chosen.name, chosen.confidence, chosen.problem = route.variant, route.confidence, route.problem
        self._metrics.count(route)
        return mixture.use(route.variant)

    def written(self, job: ServedText, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """See `Adjusting`; a checkpoint that no text is written with gives back its memory."""
        name, mixture = str(job.chosen.name), self._mixture
        self._active[name] += 1
        try:
            yield from before_each(pieces, lambda: mixture.use(name))
        finally:
            self._active[name] -= 1
            mixture.rest([*(+self._active), *([] if +self._active else [name])])

    def told(self, jobs: Sequence[ServedText]) -> dict[str, Any]:
        """Variant and confidence of a request's prompt; of several prompts, lists of them."""
        prompts = [job for number, job in enumerate(jobs) if not number or jobs[number - 1].ids is not job.ids]
        found = {key: [getattr(job.chosen, key) for job in prompts] for key in ("name", "confidence", "problem")}
        told = {"variant": found["name"], "confidence": found["confidence"], "variant_problem": found["problem"]}
        return told if len(prompts) > 1 else {key: values[0] for key, values in told.items()}
