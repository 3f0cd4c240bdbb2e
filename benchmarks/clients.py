"""Many clients at once on the real `moqa serve`, well-behaved and hostile: what is lost, stalled, kept and logged.

Usage: python benchmarks/clients.py [--minutes 20] [--clients 200] [--model MODEL]; writes the section "Clients" of
docs/results/robustness.md.
"""

import argparse
import asyncio
import http.client
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from robustness import write_section

ROOT = Path(__file__).parents[1]
SHARES = {"good": 0.5, "leaving": 0.1, "half-open": 0.1, "slow": 0.1, "huge": 0.1, "strange": 0.1}
HALF_OPEN = 25  # connections of one half-open client
STALL = 1.0  # seconds
WARM_UP = 0.2  # of the time; as much at the end is compared with as much after it
PATIENCE = 300  # seconds for an answer; longer is lost
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
MANY = 150_000
STRANGE = [
    json.dumps(body).encode()[: 2**20 - 1]
    for body in (
        {"prompt": "a", "stop": [0] * MANY},
        {"prompt": "a", "stop": ["a"] * MANY},
        {"prompt": "a b c " * MANY},
        {"prompt": [[5]] * MANY},
        {"prompt": [5] * MANY},
        {"prompt": "a", **{f"f{n}": n for n in range(MANY // 3)}},
        {"messages": [{"role": "user", "content": "a"}] * (MANY // 6)},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * (MANY // 6)}]},
        {"messages": [{"role": "user", "content": "word " * MANY}]},
    )
] + [b"[" * MANY, b'{"a":' * MANY, b'{"prompt": ' + b"9" * MANY + b"}", b"\0" * MANY]
AMBIGUOUS = f"{HEAD}Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode()


@dataclass
class Found:
    """What happened."""

    answers: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    wrong: int = 0
    waits: list[float] = field(default_factory=list)  # seconds for an answer
    probes: list[float] = field(default_factory=list)  # seconds for /health
    own: list[float] = field(default_factory=list)  # seconds that the prober itself came late
    memory: list[int] = field(default_factory=list)  # resident bytes, once a second
    log: int = 0  # bytes
    minutes: float = 0.0
    clients: int = 0
    exit_code: int | None = None

    @property
    def growth(self) -> float:
        """Of the resident memory, from after warming up to the end."""
        part = max(1, round(len(self.memory) * WARM_UP))
        return statistics.median(self.memory[-part:]) / statistics.median(self.memory[part : 2 * part]) - 1


def asked() -> list[tuple[str, dict]]:
    """Requests whose answers are known: their text depends on nothing else."""
    prompts = ["The history of", "def main(", "A", "In the year 1900", "x^2 =", "Once upon a time"]
    completions = [{"prompt": prompt, "seed": n, "max_tokens": 4 + n} for n, prompt in enumerate(prompts)]
    chats = [
        {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 6} for prompt in prompts
    ]
    found = [("/v1/completions", body) for body in completions] + [("/v1/chat/completions", body) for body in chats]
    return found + [(path, {**body, "stream": True}) for path, body in found]


def text_of(body: dict, response: httpx.Response) -> str:
    """The text of an answer, whole or streamed."""
    response.raise_for_status()
    if not body.get("stream"):
        choice = response.json()["choices"][0]
        return choice["text"] if "text" in choice else choice["message"]["content"]
    *events, last = [line[6:] for line in response.text.splitlines() if line]
    if last != "[DONE]":
        raise ValueError(last)
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


@contextmanager
def served(model: Path, log: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    command = [sys.executable, "-m", "moqa", "serve", str(model), "--port", "0", "--threads", "1"]
    with log.open("wb") as stream:
        server = subprocess.Popen(command, stderr=stream)
        try:
            while not (line := log.read_text()).endswith("\n"):
                assert server.poll() is None, line
                time.sleep(0.1)
            yield server, line.split(" at ")[1].split("/v1")[0]
        finally:
            server.kill()
            server.wait()


def probe(port: int, stop: multiprocessing.Event, send: multiprocessing.Queue) -> None:
    """Ask for /health four times a second; in a process of its own, which the clients do not slow down."""
    waits, own = [], []
    while True:
        started = time.monotonic()
        if stop.wait(0.25):
            break
        own.append(time.monotonic() - started - 0.25)
        started, status = time.monotonic(), None
        with suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("localhost", port, timeout=PATIENCE)
            connection.request("GET", "/health")
            status = connection.getresponse().status
            connection.close()
        waits.append(time.monotonic() - started if status == 200 else PATIENCE)
    send.put((waits, own))


class Clients:
    """All clients, until the time is over."""

    def __init__(self, url: str, minutes: float, expected: dict[int, str], found: Found) -> None:
        self._url, self._expected, self._found = url, expected, found
        self._host, self._port = "localhost", int(url.rpartition(":")[2])
        self._end = time.monotonic() + 60 * minutes
        self._requests = asked()

    async def run(self, number: int) -> None:
        kinds: dict[str, Callable[[random.Random], Awaitable[object]]] = {
            "good": self._good, "leaving": self._leave, "half-open": self._half_open, "slow": self._slow,
            "huge": self._huge, "strange": self._strange,
        }  # fmt: skip
        names = [name for name, share in SHARES.items() for _ in range(max(1, round(number * share)))]
        tasks = [asyncio.ensure_future(self._repeat(name, kinds[name], n)) for n, name in enumerate(names)]
        await asyncio.gather(*(task for task, name in zip(tasks, names, strict=True) if name == "good"))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _repeat(self, name: str, act: Callable[[random.Random], Awaitable[object]], number: int) -> None:
        dice = random.Random(number)
        while time.monotonic() < self._end:
            try:
                self._found.answers[f"{name}: {await act(dice)}"] += 1
            except (OSError, httpx.HTTPError, ValueError, KeyError, asyncio.IncompleteReadError) as error:
                kind = type(error).__name__
                self._found.answers[f"{name}: {kind}"] += 1
                if name == "good":
                    self._found.lost.append(f"{kind} {str(error)[:200]}")
            await asyncio.sleep(dice.random())

    async def _good(self, dice: random.Random) -> str:
        # without TLS: its certificates take longer to load than an answer to arrive, and block all clients here
        async with httpx.AsyncClient(base_url=self._url, timeout=PATIENCE, verify=False) as client:
            for number in dice.sample(range(len(self._requests)), 4):
                path, body = self._requests[number]
                started = time.monotonic()
                text = text_of(body, await client.post(path, json=body))
                self._found.waits.append(time.monotonic() - started)
                self._found.wrong += text != self._expected[number]
        return "four answers"

    async def _leave(self, dice: random.Random) -> str:
        body = json.dumps({"prompt": "The", "max_tokens": 500, "stream": dice.random() < 0.5}).encode()
        async with self._connected() as (reader, writer):
            writer.write(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            with suppress(TimeoutError):
                await asyncio.wait_for(reader.read(300), 3 * dice.random())
        return "left"

    async def _half_open(self, dice: random.Random) -> str:
        async def one() -> bytes:
            async with self._connected() as (reader, writer):
                writer.write(HEAD[: dice.randrange(len(HEAD))].encode())
                return await reader.read()

        closed = await asyncio.gather(*(one() for _ in range(HALF_OPEN)), return_exceptions=True)
        late = [isinstance(answer, bytes) and b" 408 " in answer for answer in closed]
        return "some got 408" if any(late) else "all closed"

    async def _slow(self, dice: random.Random) -> str:
        async with self._connected() as (reader, writer):
            writer.write(f"{HEAD}Content-Length: {dice.choice((1000, 1_000_000))}\r\n\r\n".encode())
            writer.write(b" " * dice.choice((1, 300_000)))
            while True:
                writer.write(b" ")
                with suppress(TimeoutError):
                    return _status(await asyncio.wait_for(reader.read(300), 1))

    async def _huge(self, dice: random.Random) -> str:
        lengths = ("Content-Length: 8388608", "Transfer-Encoding: chunked")
        async with self._connected() as (reader, writer):
            chunked = dice.random() < 0.5
            writer.write(f"{HEAD}{lengths[chunked]}\r\n\r\n".encode())
            part = b" " * 2**16
            with suppress(OSError):
                for _ in range(128):
                    writer.write(b"10000\r\n" + part + b"\r\n" if chunked else part)
                    await writer.drain()
            return _status(await reader.read(300))

    async def _strange(self, dice: random.Random) -> str:
        if dice.random() < 0.1:
            request = AMBIGUOUS
        else:
            body = dice.choice(STRANGE)
            head = HEAD.replace("/completions", "/chat/completions") if b"messages" in body[:20] else HEAD
            request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        async with self._connected() as (reader, writer):
            writer.write(request)
            return _status(await reader.read(300))

    def _connected(self) -> "_Connected":
        return _Connected(self._host, self._port)


class _Connected:
    def __init__(self, host: str, port: int) -> None:
        self._to = host, port

    async def __aenter__(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, self._writer = await asyncio.open_connection(*self._to)
        return reader, self._writer

    async def __aexit__(self, *_: object) -> None:
        self._writer.transport.abort()


def _status(answer: bytes) -> str:
    return answer[9:12].decode() or "closed"


async def watched(clients: Clients, number: int, pid: int, found: Found) -> None:
    async def watch() -> None:
        while True:
            status = Path(f"/proc/{pid}/status").read_text()
            found.memory.append(1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1]))
            await asyncio.sleep(1)

    watching = asyncio.ensure_future(watch())
    await clients.run(number)
    watching.cancel()


def measure(model: Path, minutes: float, clients: int) -> Found:
    """Serve a model to clients for some time."""
    found = Found(minutes=minutes, clients=clients)
    with tempfile.TemporaryDirectory() as folder, served(model, Path(folder) / "log") as (server, url):
        with httpx.Client(base_url=url, timeout=PATIENCE) as one:
            expected = {n: text_of(body, one.post(path, json=body)) for n, (path, body) in enumerate(asked())}
        log = (Path(folder) / "log").stat().st_size
        spawn = multiprocessing.get_context("spawn")
        stop, waits = spawn.Event(), spawn.Queue()
        prober = spawn.Process(target=probe, args=(int(url.rpartition(":")[2]), stop, waits), daemon=True)
        prober.start()
        asyncio.run(watched(Clients(url, minutes, expected, found), clients, server.pid, found))
        stop.set()
        found.probes, found.own = waits.get(timeout=2 * PATIENCE)
        server.send_signal(signal.SIGTERM)
        found.exit_code = server.wait(60)
        found.log = (Path(folder) / "log").stat().st_size - log - len("moqa: stopped\n")
    return found


def section(found: Found, model: Path) -> str:
    """The section of the page."""
    probes, waits = found.probes, sorted(found.waits)
    kinds = "; ".join(f"{name} {count}" for name, count in sorted(found.answers.items()))
    rows = {
        "answers, all compared with those of a single client": f"{len(waits)}",
        "lost, wrong": f"{len(found.lost)}, {found.wrong}",
        "time of an answer, median and longest": f"{statistics.median(waits):.2f} s, {waits[-1]:.1f} s",
        f"`/health`: probes, of them above {STALL:g} s": f"{len(probes)}, {sum(wait > STALL for wait in probes)}",
        "`/health`: median, 99 %, longest": _shares(found.probes),
        "the machine: delay of the prober's own clock, median, 99 %, longest": _shares(found.own),
        "resident memory after warming up, at the end": f"{found.memory[len(found.memory) // 5] / 2**20:.0f} MiB, "
        f"{found.memory[-1] / 2**20:.0f} MiB ({found.growth:+.1%} of the medians)",
        "bytes of log": f"{found.log}",
        "exit code after SIGTERM": f"{found.exit_code}",
    }
    return "\n".join(
        [
            f"Made by `python benchmarks/clients.py --minutes {found.minutes:g} --clients {found.clients}`: `moqa "
            f"serve` of `{model.name}` with one thread, on {os.cpu_count()} cores that it shares with its clients and "
            f"others (load {os.getloadavg()[1]:.0f}). Half of the clients ask and compare answers; a tenth each leave "
            f"in the middle of an answer, hold {HALF_OPEN} half-open connections, send a body byte by byte, send 8 "
            "MiB, and send bodies of a megabyte that are strange (numbers as `stop`, thousands of fields or messages, "
            "deep nesting) or ambiguous.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
            f"What the clients met: {kinds}.",
            "",
        ]
    )


def _shares(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    return ", ".join(
        f"{ordered[min(len(ordered) - 1, int(part * len(ordered)))] * 1000:.0f} ms" for part in (0.5, 0.99, 1)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--model", type=Path, default=ROOT / "reference" / "model")
    options = parser.parse_args()
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(files, min(most, 2**14)), most))
    found = measure(options.model, options.minutes, options.clients)
    text = section(found, options.model)
    write_section("## Clients", text)
    print(text)
    for lost in found.lost[:20]:
        print("lost:", lost)


if __name__ == "__main__":
    main()
