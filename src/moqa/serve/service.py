"""A loaded model and its scheduler, as used by the routes."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from moqa.generation import Piece, Sampling, begin_grammar, check_room, encode, generate
from moqa.serve.adjusting import Adjusting
from moqa.serve.bodies import Bodies, body_limit
from moqa.serve.common import check_variant
from moqa.serve.metrics import Metrics
from moqa.serve.refusal import RefusalError
from moqa.serve.scheduler import Scheduler
from moqa.serve.text import Chosen, ServedText

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moqa.serve.schema import ChatRequest, CompletionRequest

Text = tuple[Sequence[int], Sampling]


class Service:
    """One model shared by many clients.

    >>> service = Service(model, tokenizer, "out", slots=4, queue=256)
    >>> service.scheduler.start()

    Args:
        model: a causal language model of transformers; only the scheduler's thread uses it.
        tokenizer: tokenizer of the model.
        names: names of the model in requests; the first is that of the responses.
        slots: texts written at the same time.
        queue: texts that may wait.
        adjusting: makes the object that chooses adjustments; None for no adjustments.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        names: str | Sequence[str],
        slots: int,
        queue: int,
        adjusting: Callable[[Metrics], Adjusting] | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
        self.name = self.names[0]
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.metrics = Metrics()
        self.adjusting = (adjusting or partial(Adjusting, model))(self.metrics)

        def begin(job: ServedText) -> Iterator[Piece]:
            return self.adjusting.written(job, generate(self.adjusting.model(job), tokenizer, job.ids, job.sampling))

        self.scheduler = Scheduler(begin, slots, queue, self.metrics)
        self.bodies = Bodies(body_limit(self.context))
        # the first use of a tokenizer resets its truncation, which must not happen in two threads at the same time
        encode(tokenizer, "")

    def texts(self, prompts: Sequence[str | list[int]], samplings: Sequence[Sampling]) -> list[Text]:
        """Tokenize prompts, and check that each fits the context.

        Args:
            prompts: texts or tokens.
            samplings: of the copies that are written for each prompt.

        Raises:
            MoqaError: if a prompt is empty, has unknown tokens or is too long, or a grammar cannot be used.
            RefusalError: if there are more texts than fit into slots and queue.
        """
        wanted = len(prompts) * len(samplings)
        if wanted > self.scheduler.room:
            param = "prompt" if len(prompts) > 1 else "n"
            raise RefusalError(400, f"{wanted} texts are too many: at most {self.scheduler.room} fit", param=param)
        encoded = (
            encode(self.tokenizer, prompt, context=self.context) if isinstance(prompt, str) else prompt
            for prompt in prompts
        )
        return [text for ids in encoded for text in self._checked(ids, samplings)]

    def start(self, texts: Sequence[Text], chosen: Chosen) -> "Running":
        """Queue the texts of one request, to be written with one adjustment.

        Raises:
            RefusalError: 429 if the queue is full, 503 if the server is stopping.
        """
        running = Running(self.scheduler, texts, chosen)
        self.adjusting.note(chosen)
        return running

    def choose(self, body: "ChatRequest | CompletionRequest", client: str | None) -> Chosen:
        """The adjustment or variant that a request asks for.

        Args:
            body: the request.
            client: whose request it is; None if nothing says so.

        Raises:
            RefusalError: 400 if the server has none of that name.
        """
        chosen, names = self.adjusting.choose(body.adjustment, body.chooses, client), self.adjusting.variants
        check_variant(body.variant, names)
        if body.variant is None:
            return chosen
        return Chosen(body.variant, explicit=True, client=client)

    def note(self, running: "Running") -> dict[str, Any]:
        """Fields of a response in addition to its usage."""
        return self.adjusting.told(running.jobs)

    @property
    def by_client(self) -> bool:
        """Whether clients have to be told apart."""
        return self.adjusting.by_client

    @property
    def stopping(self) -> bool:
        """Whether new texts are refused because the server stops."""
        return self.scheduler.stopping

    def open(self) -> None:
        """Start the scheduler."""
        self.scheduler.start()

    def stop(self, seconds: float) -> None:
        """See `Scheduler`."""
        self.scheduler.stop(seconds)

    def close(self) -> None:
        """Stop all threads, once the scheduler has stopped."""
        self.scheduler.join()
        self.adjusting.close()
        self.bodies.close()

    def _checked(self, ids: Sequence[int], samplings: Sequence[Sampling]) -> list[Text]:
        for sampling in samplings[:1]:  # they differ only in their seeds
            check_room(self.model, ids, sampling)
            begin_grammar(self.model, self.tokenizer, sampling)
        return [(ids, sampling) for sampling in samplings]


class Running:
    """The texts of one request while they are written.

    Args:
        scheduler: the scheduler that writes them.
        texts: tokens and sampling options of each text.
        chosen: adjustment or variant to write them with.

    Attributes:
        jobs: the texts.
    """

    def __init__(self, scheduler: Scheduler, texts: Sequence[Text], chosen: Chosen) -> None:
        self.count = len(texts)
        self._scheduler = scheduler
        self._events = events = asyncio.Queue[tuple[int, Piece | Exception]]()
        loop = asyncio.get_running_loop()

        def deliver(index: int, event: Piece | Exception) -> None:
            with suppress(RuntimeError):  # the event loop is closed: nobody waits any more
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

        self.jobs = [
            ServedText(ids, sampling, partial(deliver, index), replace(chosen))
            for index, (ids, sampling) in enumerate(texts)
        ]
        scheduler.submit(self.jobs)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces of all texts in the order they are written, each with the index of its text.

        Raises:
            Exception: the error of a text that failed.
        """
        left = self.count
        while left:
            index, event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            left -= event.finish is not None
            yield index, event

    def cancel(self) -> None:
        """Free slots and places in the queue; does nothing if all texts are finished."""
        self._scheduler.cancel(self.jobs)
