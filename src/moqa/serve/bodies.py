"""Bodies of requests: what they may cost, and how they are read without holding up other clients."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from moqa.generation.sampling import should
from moqa.serve.forms import KIND, form_fields, is_form
from moqa.serve.refusal import RefusalError

_T = TypeVar("_T")
_Body = TypeVar("_Body", bound=BaseModel)
_PER_TOKEN = 16  # bytes: a token as a number takes 8, and as a text 4, or some more where JSON escapes it
_LEAST = 2**20  # bytes that every server takes: requests may have many prompts
_SHORT = 2**16  # bytes
_MOST_HELD = 2**26  # bytes of long bodies at the same time
_NO_OBJECT = "the body should be a JSON object, sent as application/json"
_PROBLEMS = {"missing": "is missing", "extra_forbidden": "is not supported: leave it out"}


def body_limit(context: int | None) -> int:
    """The most bytes of one body, for a model with such a context.

    >>> body_limit(2048), body_limit(131072)
    (1048576, 2097152)
    """
    return max(_LEAST, _PER_TOKEN * (context or 0))


class Bodies:
    """Reads bodies in threads: one for long bodies, and one for the short ones of each kind, which never wait for it.

    A parser, a template and a tokenizer may need a second for a long body, and a hostile template for any, during which
    the event loop goes on with other clients, and so do requests without a template.

    >>> bodies = Bodies(body_limit(2048))
    >>> body, texts = await bodies.read(request, CompletionRequest, prepare)  # doctest: +SKIP

    Args:
        limit: most bytes of one body.
        forms: whether a body may be a form with files, too.
    """

    def __init__(self, limit: int, forms: bool = False) -> None:
        self.limit, self._forms = limit, forms
        self._held, self._most_held = 0, max(_MOST_HELD, 4 * limit)
        self._rested = 0.0  # when the next long one may begin
        self._long = ThreadPoolExecutor(1, "moqa-long-bodies")
        self._short = defaultdict[type[BaseModel], ThreadPoolExecutor](partial(ThreadPoolExecutor, 1, "moqa-bodies"))

    async def read(self, request: Request, kind: type[_Body], prepare: Callable[[_Body], _T]) -> tuple[_Body, _T]:
        """Read the body of a request, and prepare what it asks for.

        Args:
            request: the request.
            kind: what its body should be.
            prepare: called in a thread beside the event loop.

        Raises:
            RefusalError: 413 if the body is too long, 429 if too many others are being read, 400 if it is no `kind`.
            ClientDisconnect: if the client disconnects first.
        """
        content_type = request.headers.get("content-type", "")
        if not _is_json(content_type) and not (self._forms and is_form(content_type)):
            raise RefusalError(400, f"{_NO_OBJECT}, or {KIND}" if self._forms else _NO_OBJECT)
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > self.limit:
            raise self._too_long()
        data, counted = bytearray(), 0
        try:
            async for part in request.stream():
                data += part
                if len(data) > self.limit:
                    raise self._too_long()
                if len(data) > _SHORT:
                    self._held += len(data) - counted
                    counted = len(data)
                    if self._held > self._most_held:
                        headers = {"Retry-After": "1"}
                        raise RefusalError(429, "too many long bodies: try again later", code="busy", headers=headers)

            def work() -> tuple[_Body, _T]:
                body = _parsed(data, kind, content_type)
                return body, prepare(body)

            loop = asyncio.get_running_loop()
            if counted:
                return await unless_gone(request, loop.run_in_executor(self._long, self._resting, work))
            return await unless_gone(request, loop.run_in_executor(self._short[kind], work))
        finally:
            self._held -= counted

    def _resting(self, work: Callable[[], _T]) -> _T:
        """Do the work of a long body, after a rest for as long as the last one took: parsers let nobody else run."""
        time.sleep(max(0.0, self._rested - time.monotonic()))
        started = time.monotonic()
        try:
            return work()
        finally:
            self._rested = 2 * time.monotonic() - started

    def _too_long(self) -> RefusalError:
        return RefusalError(413, f"the body is longer than {self.limit} bytes", code="body_too_large")

    def close(self) -> None:
        """Stop the threads."""
        for threads in (self._long, *self._short.values()):
            threads.shutdown()


async def unless_gone(request: Request, work: Awaitable[_T]) -> _T:
    """The result of some work, unless the client disconnects first.

    Raises:
        ClientDisconnect: if the client disconnects first.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


def _is_json(content_type: str) -> bool:
    name = content_type.partition(";")[0].strip().lower()
    return name == "application/json" or (name.startswith("application/") and name.endswith("+json"))


def _parsed(data: bytearray, kind: type[_Body], content_type: str) -> _Body:
    body = form_fields(bytes(data), content_type) if is_form(content_type) else _from_json(data)
    if not isinstance(body, dict):
        raise RefusalError(400, _NO_OBJECT)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _invalid(error) from None


def _from_json(data: bytearray) -> Any:
    try:
        # strings are not cached: they are clients', and a cache would keep them
        return from_json(bytes(data), cache_strings="none")
    except ValueError:
        raise RefusalError(400, "the body is not JSON") from None


def _invalid(error: ValidationError) -> RefusalError:
    """The refusal for the first invalid field, which quotes nothing but the field's name."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    # names come from the client and may be anything
    place = [str(part)[:40].encode(errors="replace").decode() for part in first["loc"]]
    problem = _PROBLEMS.get(first["type"], should(first["msg"]))
    return RefusalError(400, " ".join([".".join(place) or "the body", problem]), param=place[0] if place else None)
