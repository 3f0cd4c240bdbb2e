"""What clients may cost the server: connections, time and bodies."""

import asyncio
import json
import logging
import resource
import socket
import threading
import time

import httpx
import pytest
import uvicorn
from pydantic import ValidationError
from serving import GREEDY, LONG, PATIENCE, asked, complete, fails, running
from starlette.responses import JSONResponse

from moqa.serve import bodies, service
from moqa.serve.bodies import body_limit
from moqa.serve.connection import Connection, Connections
from moqa.serve.run import log_once_a_minute
from moqa.serve.schema import ChatRequest, CompletionRequest

JSON = {"content-type": "application/json"}


def connect(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), PATIENCE)


def rest(client):
    """What a server sends until it closes the connection."""
    found = b""
    try:
        while part := client.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found


def wait_for(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def head(length=None, path="/v1/completions"):
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, *([f"Content-Length: {length}"] if length else []), "", ""]).encode()


class Transport(asyncio.Transport):
    """What a connection does with its socket, without one."""

    def __init__(self):
        super().__init__({"socket": None})
        self.reads, self.written, self._closed = True, b"", False

    def abort(self):
        self._closed = True

    close = abort

    def is_closing(self):
        return self._closed

    def pause_reading(self):
        self.reads = False

    def resume_reading(self):
        self.reads = True

    def write(self, data):
        self.written += data


def made(shared, app=print):
    """A connection with such a transport."""
    config, state = uvicorn.Config(app, log_config=None), uvicorn.server.ServerState()
    connection, transport = Connection(shared=shared, config=config, server_state=state, app_state={}), Transport()
    connection.connection_made(transport)
    return connection, transport


class TestTime:
    @pytest.fixture(scope="class")
    def quick(self, tiny):
        """A server of little patience."""

        def late(begin):
            def begin_later(job):
                time.sleep(0.5)
                return begin(job)

            return begin_later

        connections = Connections(50, {"head": 0.3, "body": 0.3, "read": 0.3})
        with running(tiny, connections=connections, begin=late) as address:
            yield address

    @pytest.mark.parametrize("begin", [b"P", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX: "])
    def test_of_a_head_is_limited(self, quick, begin):
        with connect(quick) as client:
            client.sendall(begin)
            found = rest(client)
        assert found.startswith(b"HTTP/1.1 408 ")
        assert json.loads(found.split(b"\r\n\r\n")[1])["error"]["code"] == "timeout"

    def test_of_silence_is_limited(self, quick):
        with connect(quick) as client:
            assert rest(client) == b""

    def test_of_a_body_is_limited(self, quick):
        with connect(quick) as client:
            client.sendall(head(1000) + b'{"prompt": ')
            assert rest(client).startswith(b"HTTP/1.1 408 ")

    def test_is_not_extended_by_a_byte_now_and_then(self, quick):
        with connect(quick) as client:
            client.sendall(head(10**6))
            client.settimeout(0.02)
            for _ in range(int(PATIENCE / 0.02)):
                client.sendall(b" ")
                try:
                    found = client.recv(100)
                    break
                except TimeoutError:
                    continue
        assert found.startswith(b"HTTP/1.1 408 ")

    def test_is_limited_for_every_request_of_a_connection(self, quick):
        with connect(quick) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")
            found = rest(client)
        assert found.startswith(b"HTTP/1.1 200 ")
        assert found.count(b"HTTP/1.1 408 ") == 1

    def test_of_an_answer_is_not_limited(self, quick):
        with httpx.Client(base_url=quick, timeout=PATIENCE) as http:
            assert complete(http, prompt="The", **GREEDY).status_code == 200

    def test_of_a_client_that_does_not_read_is_limited(self):
        async def wait(reads):
            connection, transport = made(Connections(5, {"head": 60, "body": 60, "read": 0.01}))
            connection.pause_writing()
            if reads:
                connection.resume_writing()
            await asyncio.sleep(0.05)
            aborted = transport.is_closing()
            connection.connection_lost(None)
            return aborted

        assert asyncio.run(wait(reads=False))
        assert not asyncio.run(wait(reads=True))

    def test_is_not_spent_on_a_body_that_was_answered(self, monkeypatch):
        monkeypatch.setattr("moqa.serve.connection._UNREAD_PAUSE", 0.01)

        async def refuse(scope, receive, send):
            await JSONResponse({}, 413)(scope, receive, send)

        async def wait():
            connection, transport = made(Connections(5), refuse)
            connection.data_received(head(10**8))
            while not transport.written:
                await asyncio.sleep(0.01)
            reads = transport.reads
            connection.data_received(b" " * 2**17)
            paused = not transport.reads
            while not transport.reads:
                await asyncio.sleep(0.01)
            connection.connection_lost(None)
            return reads, paused

        assert asyncio.run(wait()) == (True, True)


class TestConnections:
    def test_without_a_request_make_room(self, tiny):
        with running(tiny, connections=Connections(8)) as url:
            half_open = []
            for _ in range(20):
                half_open.append(connect(url))
                half_open[-1].sendall(head()[:20])
                assert httpx.get(f"{url}/health", timeout=PATIENCE).json() == {"status": "ok"}
            assert rest(half_open[0]) == b""
            for client in half_open:
                client.close()

    def test_with_a_body_that_does_not_come_make_room(self, tiny):
        with running(tiny, connections=Connections(4)) as url:
            slow = [connect(url) for _ in range(6)]
            for client in slow:
                client.sendall(head(100) + b"{")
                with httpx.Client(base_url=url, timeout=PATIENCE) as http:
                    assert complete(http, prompt="The", **GREEDY).status_code == 200
            for client in slow:
                client.close()

    def test_with_a_request_are_not_dropped_for_others(self, tiny):
        begun = threading.Semaphore(0)

        def telling(begin):
            def tell(job):
                begun.release()
                yield from begin(job)

            return tell

        options = {"connections": Connections(2), "begin": telling}
        with running(tiny, **options) as url, asked(url, **LONG), asked(url, **{**LONG, "prompt": "A"}):
            assert begun.acquire(timeout=PATIENCE)
            assert begun.acquire(timeout=PATIENCE)
            with connect(url) as client:
                client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                found = rest(client)
            assert found.startswith(b"HTTP/1.1 503 ")
            assert b"too many connections" in found

    def test_are_as_many_as_files_allow(self, monkeypatch):
        allowed = {}
        monkeypatch.setattr(resource, "setrlimit", lambda _, limits: allowed.update(now=limits))
        monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
        assert Connections.of(500).limit == 500
        assert allowed == {}
        assert Connections.of(2000).limit == 2000
        assert 2000 < allowed["now"][0] <= 4096
        assert 3000 < Connections.of(10**6).limit < 4096
        assert allowed["now"] == (4096, 4096)

    def test_that_cannot_be_accepted_are_one_line(self, caplog):
        async def fail():
            asyncio.get_running_loop().set_exception_handler(log_once_a_minute())
            for _ in range(1000):
                error = OSError(24, "Too many open files")
                asyncio.get_running_loop().call_exception_handler({"message": "accept", "exception": error})

        asyncio.run(fail())
        assert [record.getMessage() for record in caplog.records] == ["moqa: accept: Too many open files"]


class TestFraming:
    SMUGGLED = b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"

    @pytest.mark.parametrize(
        "lines",
        [
            [b"Content-Length: 5", b"Transfer-Encoding: chunked"],
            [b"Transfer-Encoding: chunked", b"Content-Length: 51"],
            [b"Content-Length: 5", b"Content-Length: 51"],
            [b"Content-Length: 5, 51"],
            [b"Content-Length: +5"],
            [b"Content-Length: 0x5"],
            [b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"],
            [b"Transfer-Encoding: gzip, chunked"],
            [b"Transfer-Encoding: xchunked"],
            [b"Transfer-Encoding : chunked"],
            [b"Host: other"],
        ],
    )
    def test_that_has_two_meanings_is_refused(self, url, lines, caplog):
        with connect(url) as client:
            client.sendall(
                b"\r\n".join([b"POST /v1/completions HTTP/1.1", b"Host: localhost", *lines, b"", self.SMUGGLED])
            )
            found = rest(client)
        assert found.startswith(b"HTTP/1.1 400 ")
        assert found.count(b"HTTP/1.1") == 1
        assert b"connection: close" in found
        assert json.loads(found.split(b"\r\n\r\n")[1])["error"]["code"] == "invalid_http"
        assert not caplog.records

    def test_of_old_http_is_a_length(self, url):
        with connect(url) as client:
            client.sendall(b"POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
            assert rest(client).startswith(b"HTTP/1.1 400 ")

    def test_in_countless_chunks_is_refused(self, url):
        with connect(url) as client:
            client.sendall(head().replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n"))
            client.sendall(b"1\r\n \r\n" * 5000)
            assert rest(client).startswith(b"HTTP/1.1 400 ")

    def test_that_breaks_after_the_answer_is_quiet(self, url, caplog):
        with connect(url) as client:
            client.sendall(b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 404 ")
            client.sendall(b"no chunk\r\n")
            assert b"HTTP/1.1" not in rest(client)
        assert not caplog.records

    def test_and_upgrades_are_quiet(self, http, caplog):
        with caplog.at_level(logging.WARNING):
            headers = {"connection": "upgrade", "upgrade": "websocket"}
            assert http.get("/health", headers=headers).status_code == 200
        assert not [record for record in caplog.records if record.name.startswith("uvicorn")]


class TestBodies:
    MANY = 100_000

    @pytest.mark.parametrize(
        ("kind", "body"),
        [
            (CompletionRequest, {"prompt": "a", "stop": [0] * MANY}),
            (CompletionRequest, {"prompt": "a", "stop": ["a"] * MANY}),
            (CompletionRequest, {"prompt": "a", **{f"field{n}": n for n in range(MANY)}}),
            (CompletionRequest, {"prompt": [[0.5]] * MANY}),
            (CompletionRequest, {"prompt": [[5]] * MANY}),
            (CompletionRequest, {"prompt": ["a"] * MANY}),
            (CompletionRequest, {"prompt": ["a"] * MANY + [0]}),
            (ChatRequest, {"messages": [{"role": "user", "content": [0] * MANY}]}),
            (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * MANY}]}),
            (ChatRequest, {"messages": [{"role": "user", "content": ""}] * MANY}),
            (ChatRequest, {"messages": [0] * MANY}),
            (ChatRequest, {"messages": [{"role": "user", "content": "", **{f"field{n}": n for n in range(MANY)}}]}),
        ],
    )
    def test_have_few_errors_whatever_their_shape(self, kind, body):
        with pytest.raises(ValidationError) as found:
            kind.model_validate(body)
        assert found.value.error_count() <= 4

    @pytest.mark.parametrize(
        "content",
        [
            b'{"prompt":' + b"[" * 400_000,
            b'{"a":' * 100_000,
            b'{"prompt": ' + b"9" * 500_000 + b"}",
            b'{"a": "\\ud800"}',
        ],
    )
    def test_that_are_strange_are_refused(self, http, content):
        fails(http.post("/v1/completions", content=content, headers=JSON), 400)

    def test_are_limited_by_the_context(self, tiny, http):
        assert [body_limit(context) for context in (None, 2048, 2**17)] == [2**20, 2**20, 2**21]
        limit = body_limit(tiny[0].config.max_position_embeddings)
        fails(http.post("/v1/completions", content=b" " * (limit + 1), headers=JSON), 413)
        fails(http.post("/v1/completions", content=b" " * limit, headers=JSON), 400, word="JSON")

    def test_that_say_they_are_too_long_are_not_read(self, url):
        with connect(url) as client:
            client.sendall(head(10**9))
            assert client.recv(100).startswith(b"HTTP/1.1 413 ")

    @pytest.fixture
    def held_up(self, monkeypatch):
        """Long texts are tokenized when this is set."""
        go, encode = threading.Event(), service.encode

        def encode_later(tokenizer, text, **options):
            if len(text) > 2**16:
                assert go.wait(PATIENCE)
            return encode(tokenizer, text, **options)

        monkeypatch.setattr(service, "encode", encode_later)
        yield go
        go.set()

    def test_that_are_long_hold_up_nobody(self, tiny, held_up):
        with running(tiny) as url, httpx.Client(base_url=url, timeout=PATIENCE) as http:
            found = []
            long = {"prompt": "a " * 40_000, **GREEDY}
            thread = threading.Thread(target=lambda: found.append(complete(http, **long)))
            thread.start()
            assert http.get("/health").json() == {"status": "ok"}
            assert complete(http, prompt="The", **GREEDY).status_code == 200
            assert found == []
            held_up.set()
            thread.join(PATIENCE)
            fails(found[0], 400, word="the context of the model holds")

    def test_that_are_long_are_limited_together(self, tiny, held_up, monkeypatch):
        monkeypatch.setattr(bodies, "_MOST_HELD", 0)
        monkeypatch.setattr(bodies, "_LEAST", 0)
        monkeypatch.setattr(bodies, "_PER_TOKEN", 4)
        found = []
        with running(tiny) as url, httpx.Client(base_url=url, timeout=PATIENCE) as http:
            threads = [
                threading.Thread(target=lambda: found.append(complete(http, prompt="a " * 60_000))) for _ in range(6)
            ]
            for thread in threads:
                thread.start()
            wait_for(lambda: len(found) == 2)
            assert complete(http, prompt="The", **GREEDY).status_code == 200
            held_up.set()
            for thread in threads:
                thread.join(PATIENCE)
            assert sorted(response.status_code for response in found) == [400] * 4 + [429] * 2
            fails(found[0], 429, word="try again later")
            assert int(found[0].headers["retry-after"]) > 0
            fails(complete(http, prompt="a " * 60_000), 400, word="context")
