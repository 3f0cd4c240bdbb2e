"""Middleware for every request: API key, limit on the body, metrics, and errors that nothing else handled."""

import hmac

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moqa.serve.metrics import Metrics
from moqa.serve.refusal import RefusalError, refusal_of

BODY_LIMIT = 8 * 2**20  # bytes; enough for a million tokens as numbers
ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")


class Guard:
    """ASGI middleware around the whole application.

    Args:
        app: the wrapped application.
        metrics: metrics of the server.
        api_key: bearer token required under `/v1`; None for no key.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None) -> None:
        self._app, self._metrics = app, metrics
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, _bounded(receive), noted)
        except ClientDisconnect:
            status = 499  # common status for a client that disconnected; only counted, never sent
        except Exception as error:
            refusal = refusal_of(error)
            if status == 0:
                await refusal.response()(scope, receive, noted)
        finally:
            route = scope["path"] if scope["path"] in ROUTES else "other"
            self._metrics.requests.labels(route, status or 499).inc()

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self._expected is not None and scope["path"].startswith("/v1"):
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                message = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"
                raise RefusalError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > BODY_LIMIT:
            raise _too_large()


def _bounded(receive: Receive) -> Receive:
    """Wrap `receive` so that it reads no more of a body than the limit, whatever the headers say."""
    size = 0

    async def bounded() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > BODY_LIMIT:
            raise _too_large()
        return message

    return bounded


def _too_large() -> RefusalError:
    return RefusalError(413, f"the body is longer than {BODY_LIMIT} bytes", code="body_too_large")
