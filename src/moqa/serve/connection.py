"""HTTP/1.1 as uvicorn speaks it, with time limits, a limit of connections, and one meaning of every request."""

import asyncio
import resource
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from moqa.serve.refusal import RefusalError

ACCEPTED = 32  # connections that the event loop accepts in one turn, before it closes those beyond the limit
_FILES = 128 + 3 * ACCEPTED  # files left for everything else: the model, the event loop, connections being closed
_FEWEST = 16
_UNREAD_PAUSE = 0.2  # seconds between two parts of a body that nobody reads
_CHUNKS = 4096  # of one body: reading one takes the event loop some microseconds, however short it is


@dataclass
class Connections:
    """The connections of one server, and what limits them.

    Attributes:
        limit: most connections at once.
        seconds: how long a client may take to send the head of a request and its body, and to read on when what was
            written for it waits; each is a total, so that a byte now and then does not extend it.
        unasked: connections that have no complete request, the longest waiting one first.
    """

    limit: int
    seconds: dict[str, float] = field(default_factory=lambda: {"head": 10, "body": 30, "read": 60})
    unasked: "dict[Connection, None]" = field(default_factory=dict)

    @classmethod
    def of(cls, wanted: int) -> "Connections":
        """As many connections as wanted, or fewer if the process may not open as many files.

        >>> Connections.of(500).limit
        500
        """
        files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        if files < wanted + _FILES:
            files = wanted + _FILES if most == resource.RLIM_INFINITY else min(most, wanted + _FILES)
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
        return cls(max(_FEWEST, min(wanted, files - _FILES)))


class Connection(H11Protocol):
    """One client's connection.

    A new connection beyond the limit takes the place of the one that has waited longest for a request, so clients that
    send none keep nobody out.

    Args:
        shared: all connections of the server.
        options: as uvicorn gives them.
    """

    def __init__(self, *, shared: Connections, **options: Any) -> None:
        super().__init__(**options)
        self.conn = _StrictHTTP(h11.SERVER)
        self._shared = shared
        self._phase = ""  # of a request: idle before its first byte, head, body, or asked when it is complete
        self._late: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio."""
        super().connection_made(transport)
        if len(self.connections) > self._shared.limit:
            oldest = next(iter(self._shared.unasked), None)
            if oldest is None:
                self._refuse(RefusalError(503, "too many connections", code="too_many_connections"))
                return
            oldest.drop()
        self._follow()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        super().connection_lost(exc)
        self._enter("asked")
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self._phase == "idle":
            self._enter("head")
        super().data_received(data)
        self._follow()
        if self._phase == "body" and self.conn.our_state is h11.DONE:
            # it was answered already, and many clients read the answer only after they have sent everything
            self.flow.pause_reading()
            self.loop.call_later(_UNREAD_PAUSE, self.flow.resume_reading)

    def on_response_complete(self) -> None:
        """See uvicorn."""
        super().on_response_complete()
        self._follow()

    def pause_writing(self) -> None:
        """See asyncio."""
        super().pause_writing()
        self._unread = self.loop.call_later(self._shared.seconds["read"], self.drop)

    def resume_writing(self) -> None:
        """See asyncio."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """See uvicorn."""
        self._refuse(RefusalError(400, "the request is not valid HTTP", code="invalid_http"))

    def shutdown(self) -> None:
        """See uvicorn, which would wait for bodies that are still being sent."""
        if self._phase == "body":
            self.drop()
        else:
            super().shutdown()

    def drop(self) -> None:
        """Close the connection, without sending what waits."""
        self._enter("asked")
        self.transport.abort()

    def _follow(self) -> None:
        """Notice where the request is now."""
        if self.transport.is_closing():
            return
        state = self.conn.their_state
        if state is h11.SEND_BODY:
            self._enter("body")
        elif state is not h11.IDLE:
            self._enter("asked")
        elif self.cycle is None or self.conn.trailing_data[0]:
            self._enter("head")
        else:
            self._enter("idle")  # uvicorn closes it in time

    def _enter(self, phase: str) -> None:
        if phase == self._phase:
            return
        self._phase = phase
        self._shared.unasked.pop(self, None)
        if phase != "asked":
            self._shared.unasked[self] = None
        if self._late is not None:
            self._late.cancel()
            self._late = None
        if phase in self._shared.seconds:
            self._late = self.loop.call_later(self._shared.seconds[phase], self._too_late)

    def _too_late(self) -> None:
        if self.cycle is None and not self.conn.trailing_data[0]:
            self.drop()
        else:
            self._refuse(RefusalError(408, f"the {self._phase} of the request took too long", code="timeout"))

    def _refuse(self, refusal: RefusalError) -> None:
        """Answer without asking the application, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = refusal.response()
            headers = [*response.raw_headers, (b"connection", b"close")]
            reason = HTTPStatus(response.status_code).phrase.encode()
            for event in (
                h11.Response(status_code=response.status_code, headers=headers, reason=reason),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:
            self.cycle.disconnected = True  # the application must not answer, too
            self.cycle.message_event.set()
        self.transport.close()


class _StrictHTTP(h11.Connection):
    """Refuses what a proxy in front of this server may read otherwise, and bodies in countless chunks."""

    _chunks = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = 0
            names = {name for name, _ in event.headers}
            if b"transfer-encoding" in names and (b"content-length" in names or event.http_version < b"1.1"):
                raise h11.RemoteProtocolError("the length of the body is ambiguous (RFC 9112, 6.1)")
        elif isinstance(event, h11.Data) and event.chunk_start:
            self._chunks += 1
            if self._chunks > _CHUNKS:
                raise h11.RemoteProtocolError("too many chunks")
        return event
