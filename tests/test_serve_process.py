"""The server's scheduler by itself, and the command in a process of its own."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from contextlib import ExitStack

import httpx
import pytest
from serving import GREEDY, LONG, PATIENCE, complete, fails, until

from moqa.errors import MoqaError
from moqa.generation import Finish, Piece, Sampling
from moqa.serve import serve
from moqa.serve.metrics import Metrics
from moqa.serve.refusal import RefusalError
from moqa.serve.run import GRACE
from moqa.serve.scheduler import Scheduler
from moqa.serve.text import ServedText


class TestScheduler:
    @staticmethod
    def job(deliver=lambda event: None):
        return ServedText([1], Sampling(), deliver)

    def test_writes_texts_in_turns(self):
        order, done = [], threading.Event()

        def begin(job):
            for count in range(1, 4):
                order.append(job.ids[0])
                yield Piece("x", completion_tokens=count, finish=self.finish if count == 3 else None)

        scheduler = Scheduler(begin, 2, 9, Metrics())
        jobs = [
            ServedText([n], Sampling(), lambda event, n=n: n == 3 and event.finish and done.set()) for n in (1, 2, 3)
        ]
        scheduler.submit(jobs)
        scheduler.start()
        assert done.wait(PATIENCE)
        scheduler.stop(0)
        scheduler.join()
        assert order == [1, 2, 1, 2, 1, 2, 3, 3, 3]

    finish = Finish(
        finish_reason="stop", prompt_tokens=1, cached_tokens=0, completion_tokens=3, prefill_seconds=0, decode_seconds=0
    )

    def test_forgets_what_ended(self):
        left, gone = [], threading.Event()

        def begin(job):
            memory = Memory()
            weakref.finalize(memory, gone.set)
            yield Piece("x", completion_tokens=1, finish=self.finish)
            left.append(job)  # the generator refers to its job

        class Memory:
            pass

        scheduler = Scheduler(begin, 1, 1, Metrics())
        scheduler.start()
        gc.disable()
        try:
            scheduler.submit([self.job()])
            assert gone.wait(PATIENCE)
        finally:
            gc.enable()
            scheduler.stop(0)
            scheduler.join()
        assert left == []

    def test_stops_what_runs_and_what_waits(self):
        events = []

        def endless(job):
            while True:
                time.sleep(0.001)
                yield Piece()

        scheduler = Scheduler(endless, 1, 1, Metrics())
        scheduler.submit([self.job(events.append), self.job(events.append)])
        scheduler.start()
        scheduler.stop(60)
        scheduler.stop(0.1)
        scheduler.join()
        assert [event.status_code for event in events] == [503, 503]
        with pytest.raises(RefusalError, match="stopping"):
            scheduler.submit([self.job()])


class TestCommand:
    @staticmethod
    def start(model, *options, files=1000, **environment):
        command = [sys.executable, "-m", "moqa", "serve", str(model), "--port", "0", "--threads", "1", *options]
        command = ["bash", "-c", f'ulimit -n {files} && exec "$@"', "bash", *command]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
        line = server.stderr.readline()
        assert " at http://127.0.0.1:" in line, line
        return server, line.split(" at ")[1].split("/v1")[0]

    def test_finishes_and_exits_0(self, tiny_model):
        server, url = self.start(tiny_model, "--slots", "1")
        with server, httpx.Client(base_url=url, timeout=PATIENCE) as http:
            assert complete(http, model=tiny_model.name, prompt="The", **GREEDY).status_code == 200
            with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as cut:
                lines = cut.iter_lines()
                assert next(lines)
                waits = threading.Thread(target=lambda: answers.append(complete(http, **LONG)))
                answers = []
                waits.start()
                until(http, queue_length=1)
                start = time.monotonic()
                server.terminate()
                last = [line for line in lines if line][-1]
                waits.join()
            assert server.wait(PATIENCE) == 0
            assert time.monotonic() - start > GRACE - 1, "what runs gets some seconds"
            assert json.loads(last[6:])["error"]["code"] == "stopping"
            fails(answers[0], 503, word="stopping")
            assert server.stderr.read() == "moqa: stopped\n"
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/health")

    def test_stays_quiet_and_answers_among_more_connections_than_files(self, tiny_model):
        server, url = self.start(tiny_model, files=300)
        host, port = url.removeprefix("http://").split(":")
        with server, ExitStack() as stack:
            for _ in range(500):
                half_open = stack.enter_context(socket.create_connection((host, int(port)), PATIENCE))
                half_open.sendall(b"POST /v1/completions HTTP/1.1\r\n")
            slow = stack.enter_context(socket.create_connection((host, int(port)), PATIENCE))
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
            slow.sendall(b"Content-Length: 100\r\n\r\n{")
            for _ in range(3):
                assert httpx.get(f"{url}/health", timeout=PATIENCE).status_code == 200
            found = httpx.post(f"{url}/v1/completions", json={"prompt": "The", **GREEDY}, timeout=PATIENCE)
            assert found.status_code == 200
            server.terminate()
            assert server.communicate(timeout=PATIENCE)[1] == "moqa: stopped\n"

    @pytest.mark.parametrize("key", ["", " "])
    def test_an_empty_key_opens_nothing(self, tiny_model, moqa_command, monkeypatch, key):
        monkeypatch.setenv("MOQA_API_KEY", key)
        code, _, error = moqa_command("serve", tiny_model, "--port", "0")
        assert (code, "MOQA_API_KEY) is empty" in error) == (2, True)

    def test_takes_keys_from_the_environment_and_names_of_pages(self, tiny_model):
        page = "https://page.example"
        server, url = self.start(tiny_model, "--cors", page, MOQA_API_KEY="one two")
        with server:
            for key, status in (("one", 200), ("two", 200), ("one two", 401)):
                headers = {"authorization": f"Bearer {key}", "origin": page}
                found = httpx.get(f"{url}/metrics", headers=headers, timeout=PATIENCE)
                assert found.status_code == status
                assert found.headers["access-control-allow-origin"] == page
            server.send_signal(signal.SIGINT)
            assert server.communicate(timeout=PATIENCE)[1] == "moqa: stopped\n"
        assert server.returncode == 0

    def test_a_port_that_is_taken(self, tiny_model):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(MoqaError, match=f"--host 127.0.0.1 --port {port}: .*in use"):
                serve(tiny_model, port=port)

    def test_a_model_that_is_not_there(self, tmp_path):
        with pytest.raises(MoqaError, match="no model at"):
            serve(tmp_path / "none", port=0)

    def test_names_the_extra_that_is_missing(self, tiny_model, monkeypatch):
        monkeypatch.setitem(sys.modules, "uvicorn", None)
        monkeypatch.delitem(sys.modules, "moqa.serve.run")
        with pytest.raises(MoqaError, match=r"pip install 'moqa\[serve\]'"):
            serve(tiny_model)
