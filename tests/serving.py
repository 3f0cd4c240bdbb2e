"""A server in a thread, and how tests ask it."""

import json
import socket
import threading
import time
from contextlib import contextmanager

from prometheus_client.parser import text_string_to_metric_families

from moqa.generation import Sampling, generate
from moqa.serve.connection import Connections
from moqa.serve.run import Server
from moqa.serve.service import Service

GREEDY = {"temperature": 0, "max_tokens": 12}
LONG = {"prompt": "The", "max_tokens": 20000, "temperature": 0}  # half a minute, and no end token; no test waits
PATIENCE = 300  # seconds, for a machine that is busy: what takes as long hangs


@contextmanager
def running(tiny, slots=4, queue=256, begin=None, adjusting=None, connections=None, names="tiny", **options):
    """A server of a model in a thread, and where it answers."""
    service = Service(*tiny, names, slots, queue, adjusting)
    if begin:
        service.scheduler.begin = begin(service.scheduler.begin)
    server = Server(service, connections or Connections(500), **options)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    service.scheduler.start()
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        service.scheduler.stop(0)
        service.close()
        assert not thread.is_alive()


def complete(http, **body):
    return http.post("/v1/completions", json=body)


def alone(tiny, prompt, **options):
    pieces = list(generate(*tiny, prompt, Sampling(**options)))
    return "".join(piece.text for piece in pieces), pieces[-1].finish


def gauges(http):
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


@contextmanager
def asked(url, **body):
    """A client that has asked for a completion, and leaves at the end of the block."""
    host, port = url.removeprefix("http://").split(":")
    text = json.dumps(body)
    kind = "Content-Type: application/json"
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{kind}\r\nContent-Length: {len(text)}"
    with socket.create_connection((host, int(port))) as client:
        client.sendall(f"{head}\r\n\r\n{text}".encode())
        yield


def until(http, **expected):
    """Wait until gauges have some values."""
    end = time.monotonic() + PATIENCE
    while True:
        found = gauges(http)
        if all(found[f"moqa_{name}",] == value for name, value in expected.items()):
            return
        assert time.monotonic() < end, found
        time.sleep(0.02)


def fails(response, status, param=None, word=""):
    assert response.status_code == status, response.text[:300]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"].endswith("_error")
    assert error["param"] == param
    assert word in error["message"]
