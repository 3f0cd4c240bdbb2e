"""HTTP routes of the server."""

from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from moqa.generation import Finish, Piece
from moqa.serve import wanted
from moqa.serve.answers import Answer, event
from moqa.serve.bodies import unless_gone
from moqa.serve.common import common_app
from moqa.serve.refusal import refusal_of
from moqa.serve.schema import ChatRequest, CompletionRequest
from moqa.serve.service import Running, Service
from moqa.serve.tokenizing import add_tokenizer_routes

_PAGE = Path(__file__).with_name("page.html")
# nothing but the page itself, and what this server answers
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def build_app(service: Service, keys: Sequence[str] = (), cors: Sequence[str] = ()) -> FastAPI:
    """Build the application, for any ASGI server.

    >>> app = build_app(Service(model, tokenizer, "out", slots=4, queue=256))

    Args:
        service: a service whose scheduler is running.
        keys: clients must send one of them; none for no key.
        cors: origins of web pages that may ask; `*` for all.
    """
    app = common_app(service, keys, cors)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        read = await service.bodies.read(request, CompletionRequest, partial(wanted.completion, service))
        return await _answer(request, service, *read)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        read = await service.bodies.read(request, ChatRequest, partial(wanted.chat, service))
        return await _answer(request, service, *read)

    add_tokenizer_routes(app, service)

    @app.get("/")
    async def page() -> Response:
        return FileResponse(_PAGE, headers={"Content-Security-Policy": _PAGE_POLICY})

    return app


async def _answer(
    request: Request, service: Service, body: CompletionRequest | ChatRequest, asked: wanted.Wanted
) -> Response:
    client = getattr(request.state, "client", None)
    running = service.start(asked.texts, service.choose(body, client))
    note, answer = partial(service.note, running), asked.answer
    try:
        if not body.stream:
            found = await unless_gone(request, _collect(running))
            return JSONResponse(answer.whole(found, note()), headers=asked.headers)
        pieces = running.pieces()
        # an error before the first piece still gets its own HTTP status
        first = await unless_gone(request, anext(pieces))
        count = body.stream_options.include_usage
        return _Events(running, _chunks(answer, running.count, first, pieces, count, note), asked.headers)
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

    def __init__(self, running: Running, chunks: AsyncIterator[str], headers: dict[str, str]) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache", **headers})
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.cancel()
