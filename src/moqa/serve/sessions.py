"""Tells clients apart where nothing else does: by a cookie that nobody can guess."""

import re
import secrets

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "moqa-session"
_ISSUED = re.compile("[A-Za-z0-9_-]{43}")


class Sessions:
    """ASGI middleware that gives clients a session each, which lasts for as long as they keep the cookie.

    Args:
        app: the wrapped application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        session = HTTPConnection(scope).cookies.get(COOKIE, "")
        if _ISSUED.fullmatch(session):
            # one that never comes back with its cookie is no session
            scope.setdefault("state", {})["client"] = session
            await self._app(scope, receive, send)
            return

        async def with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start":
                cookie = f"{COOKIE}={secrets.token_urlsafe(32)}; Path=/; HttpOnly; SameSite=Strict"
                MutableHeaders(scope=message).append("Set-Cookie", cookie)
            await send(message)

        await self._app(scope, receive, with_cookie)
