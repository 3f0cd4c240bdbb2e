"""HTTP routes of the server."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from moqa.errors import MoqaError
from moqa.generation import Finish, Piece
from moqa.generation.sampling import should
from moqa.serve.answers import Answer, ChatAnswer, event
from moqa.serve.guard import Guard
from moqa.serve.refusal import RefusalError, refusal_of
from moqa.serve.schema import ChatRequest, CompletionRequest
from moqa.serve.service import Running, Service, Text

_T = TypeVar("_T")
_PROBLEMS = {"missing": "is missing", "extra_forbidden": "is not supported: leave it out"}


def build_app(service: Service, api_key: str | None = None) -> FastAPI:
    """Build the application, for any ASGI server.

    >>> app = build_app(Service(model, tokenizer, "out", slots=4, queue=256))

    Args:
        service: a service whose scheduler is running.
        api_key: key that clients must send; None for no key.
    """
    app = FastAPI(title="moqa", docs_url=None, redoc_url=None)
    app.add_middleware(Guard, metrics=service.metrics, api_key=api_key)
    for kind in (HTTPException, MoqaError):
        app.add_exception_handler(kind, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    model = {"id": service.name, "object": "model", "created": 0, "owned_by": "moqa"}

    @app.get("/health")
    async def health() -> Response:
        stopping = service.scheduler.stopping
        return JSONResponse({"status": "stopping" if stopping else "ok"}, 503 if stopping else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> Response:
        _check_model(service, name)
        return JSONResponse(model)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        _check_model(service, body.model)
        texts = await service.texts(body.prompts(), body.sampling(body.max_tokens, body.logprobs))
        answer = Answer(service.name, service.tokenizer, body.logprobs is not None)
        return await _answer(request, service, texts, answer, body)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        _check_model(service, body.model)
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        logprobs = body.asked_logprobs()
        messages = [message.plain() for message in body.messages]
        texts = await service.conversation(messages, lambda stops: body.sampling(limit, logprobs, stops))
        answer = ChatAnswer(service.name, service.tokenizer, body.logprobs)
        return await _answer(request, service, texts, answer, body)

    return app


def _check_model(service: Service, name: str | None) -> None:
    if name not in (None, service.name):
        raise RefusalError(404, f"no such model: the only one is {service.name}", param="model", code="model_not_found")


async def _answer(
    request: Request, service: Service, texts: Sequence[Text], answer: Answer, body: CompletionRequest | ChatRequest
) -> Response:
    running = service.start(texts, service.adjusting.choose(body.adjustment, body.chooses))
    note = partial(service.note, running.chosen)
    try:
        if not body.stream:
            found = await _unless_gone(request, _collect(running))
            return JSONResponse(answer.whole(found, note()))
        pieces = running.pieces()
        # an error before the first piece still gets its own HTTP status
        first = await _unless_gone(request, anext(pieces))
        count = body.stream_options.include_usage
        return _Events(running, _chunks(answer, running.count, first, pieces, count, note))
    except BaseException:
        running.cancel()
        raise


async def _collect(running: Running) -> list[list[Piece]]:
    texts: list[list[Piece]] = [[] for _ in range(running.count)]
    async for index, piece in running.pieces():
        texts[index].append(piece)
    return texts


async def _chunks(
    answer: Answer,
    texts: int,
    first: tuple[int, Piece],
    pieces: AsyncIterator[tuple[int, Piece]],
    count: bool,
    note: Callable[[], dict[str, Any]],
) -> AsyncIterator[str]:
    finishes: list[Finish] = []

    def chunk(index: int, piece: Piece) -> str:
        if piece.finish:
            finishes.append(piece.finish)
        data = answer.chunk(index, piece)
        if count:
            return event({**data, "usage": None})
        return event({**data, **note()} if len(finishes) == texts else data)

    try:
        for data in answer.first(texts):
            yield event(data)
        yield chunk(*first)
        async for index, piece in pieces:
            yield chunk(index, piece)
    except Exception as error:
        yield event(refusal_of(error).body())
        return
    if count:
        yield event({**answer.last(finishes), **note()})
    yield event("[DONE]")


class _Events(StreamingResponse):
    """Server-sent events; the texts are cancelled when the client disconnects, even before the first event."""

    def __init__(self, running: Running, chunks: AsyncIterator[str]) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.cancel()


async def _unless_gone(request: Request, work: Awaitable[_T]) -> _T:
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


async def _refused(_: Request, error: Exception) -> Response:
    return refusal_of(error).response()


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return RefusalError(400, "the body is not JSON").response()
    # field names come from the client and may be anything
    place = [str(part)[:40].encode(errors="replace").decode() for part in first["loc"] if part != "body"]
    if not place:
        message = "the body should be a JSON object, sent as application/json"
    elif first["type"] in _PROBLEMS:
        message = f"{'.'.join(place)} {_PROBLEMS[first['type']]}"
    else:
        message = f"{'.'.join(place)} {should(first['msg'])}"
    return RefusalError(400, message, param=place[0] if place else None).response()
