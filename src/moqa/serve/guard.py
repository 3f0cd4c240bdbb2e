"""Middleware for every request: who may ask, metrics, and errors that nothing else handled."""

import base64
import hmac
from collections.abc import Collection, Mapping, Sequence

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moqa.serve.metrics import RequestMetrics
from moqa.serve.origins import check_site
from moqa.serve.refusal import RefusalError, refusal_of

ROUTES = (
    "/", "/v1/completions", "/v1/chat/completions", "/v1/classify", "/v1/models", "/health", "/metrics", "/tokenize",
    "/detokenize", "/tokenizer_info",
)  # fmt: skip
_OPEN = ("/health",)  # without a key; says nothing but that the server runs


class Guard:
    """ASGI middleware around the whole application.

    Args:
        app: the wrapped application.
        metrics: metrics of the server.
        keys: API keys, one of which is required; without any, only pages of other sites are refused.
        cors: origins of pages that may ask.
    """

    def __init__(self, app: ASGIApp, metrics: RequestMetrics, keys: Sequence[str], cors: Collection[str]) -> None:
        self._app, self._metrics, self._cors = app, metrics, cors
        self._expected = [key.encode() for key in keys]

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
            await self._app(scope, receive, noted)
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
        if not self._expected:
            check_site(scope, headers, self._cors)
        elif scope["path"] not in _OPEN:
            given = given_key(headers)
            # each is compared, so that the time says nothing about which one is like it
            found = [number for number, key in enumerate(self._expected) if hmac.compare_digest(given, key)]
            if not found:
                message = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"
                # a browser asks its user for the key, and sends it with all that the page asks for
                scheme = 'Basic realm="moqa: the password is the API key"' if scope["path"] == "/" else "Bearer"
                raise RefusalError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": scheme})
            scope.setdefault("state", {})["client"] = f"key {found[0]}"


def given_key(headers: Mapping[bytes, bytes]) -> bytes:
    """The key in the headers, as programs (Bearer) or browsers (Basic, with any user name) send it.

    A browser sends it with what other sites' pages ask for as well: that counts as no key.

    >>> given_key({b"authorization": b"Bearer secret"}), given_key({b"authorization": b"Basic bWU6c2VjcmV0"})
    (b'secret', b'secret')
    """
    scheme, _, value = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return value
    if scheme.lower() == b"basic" and headers.get(b"origin", b"").partition(b"://")[2] in (b"", headers.get(b"host")):
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except ValueError:
            return b""
    return b""
