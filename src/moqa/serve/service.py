"""A loaded model and its scheduler: what routes work with."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from moqa.generation import Piece, Sampling, chat_prompt, check_room, encode, generate
from moqa.serve.adjusting import Adjusting
from moqa.serve.metrics import Metrics
from moqa.serve.refusal import RefusalError
from moqa.serve.scheduler import Scheduler
from moqa.serve.text import Chosen, ServedText

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_T = TypeVar("_T")
Text = tuple[Sequence[int], Sampling]


class Service:
    """One model that many clients share.

    >>> service = Service(model, tokenizer, "out", slots=4, queue=256)
    >>> service.scheduler.start()

    Args:
        model: a causal language model of transformers; only the scheduler's thread uses it.
        tokenizer: of the model.
        name: by which clients ask for it.
        slots: texts that are written at once.
        queue: texts that may wait.
        adjusting: makes what chooses adjustments; None: there are none.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        name: str,
        slots: int,
        queue: int,
        adjusting: Callable[[Metrics], Adjusting] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.metrics = Metrics()
        self.adjusting = (adjusting or partial(Adjusting, model))(self.metrics)

        def begin(job: ServedText) -> Iterator[Piece]:
            return self.adjusting.written(job, generate(model, tokenizer, job.ids, job.sampling))

        self.scheduler = Scheduler(begin, slots, queue, self.metrics)
        # a long prompt must not hold up the answers of others; one thread, so that it cannot take every core either
        self._encoder = ThreadPoolExecutor(1, "moqa-encode")
        # tokenizers drop a truncation of their own at the first use, which must not happen in two threads at once
        encode(tokenizer, "")

    async def texts(self, prompts: Sequence[str | list[int]], sampling: Sampling) -> list[Text]:
        """Prompts as tokens, each checked against the context.

        Raises:
            MoqaError: if one is empty, has unknown tokens or is too long.
            RefusalError: if there are more than fit into slots and queue.
        """
        if len(prompts) > self.scheduler.room:
            raise RefusalError(400, f"{len(prompts)} prompts: at most {self.scheduler.room} fit", param="prompt")

        def work() -> list[Text]:
            return [
                self._checked(encode(self.tokenizer, prompt) if isinstance(prompt, str) else prompt, sampling)
                for prompt in prompts
            ]

        return await self._in_encoder(work)

    async def conversation(
        self, messages: Sequence[dict[str, str]], sampling: Callable[[tuple[str, ...]], Sampling]
    ) -> list[Text]:
        """A conversation as tokens, checked against the context.

        Args:
            messages: each with a role and a content.
            sampling: from the stop strings that the model's way to chat needs.

        Raises:
            MoqaError: if the chat template refuses it, or it is too long.
        """

        def work() -> list[Text]:
            ids, stops = chat_prompt(self.tokenizer, messages)
            return [self._checked(ids, sampling(stops))]

        return await self._in_encoder(work)

    def start(self, texts: Sequence[Text], chosen: Chosen) -> "Running":
        """Queue texts, all to be written with one adjustment.

        Raises:
            RefusalError: 429 if there is no room, 503 if the server stops.
        """
        running = Running(self.scheduler, texts, chosen)
        self.adjusting.count(chosen)
        return running

    def note(self, chosen: Chosen) -> dict[str, Any]:
        """What an answer says beside its usage."""
        return {"adjustment": chosen.name, "drift": self.adjusting.drift}

    def close(self) -> None:
        """Let go of the threads, once the scheduler stops."""
        self.scheduler.join()
        self.adjusting.close()
        self._encoder.shutdown()

    def _checked(self, ids: Sequence[int], sampling: Sampling) -> Text:
        check_room(self.model, ids, sampling)
        return ids, sampling

    async def _in_encoder(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._encoder, work)


class Running:
    """Texts of one request while they are written.

    Args:
        scheduler: that writes them.
        texts: tokens and sampling of each.
        chosen: the adjustment to write them with.
    """

    def __init__(self, scheduler: Scheduler, texts: Sequence[Text], chosen: Chosen) -> None:
        self.count, self.chosen = len(texts), chosen
        self._scheduler = scheduler
        self._events: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliverer(index: int) -> Callable[[Piece | Exception], None]:
            def deliver(event: Piece | Exception) -> None:
                with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

            return deliver

        self._jobs = [
            ServedText(ids, sampling, deliverer(index), chosen) for index, (ids, sampling) in enumerate(texts)
        ]
        scheduler.submit(self._jobs)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces of all texts as they come, each with the number of its text.

        Raises:
            Exception: whatever went wrong in one of them.
        """
        left = self.count
        while left:
            index, event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            left -= event.finish is not None
            yield index, event

    def cancel(self) -> None:
        """Give slots and places in the queue back; harmless when all is written."""
        self._scheduler.cancel(self._jobs)
