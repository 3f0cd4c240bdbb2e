"""One SuperLink and four SuperNodes as processes of their own: runs/federated/processes.json.

    python benchmarks/federated_processes.py

Two nodes are throttled to half of their time. One is killed in a round and comes back later; the SuperLink is killed in
another, and the run goes on with a new one. Then a few rounds with secure aggregation.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "tests" / "federated_app"
OUT = ROOT / "runs" / "federated"
NODES, THROTTLED, HALF = 4, (2, 3), 0.1  # seconds that a throttled node works, and that it does not
ROUNDS, TIMEOUT = 20, 600
PATIENCE = 3600  # seconds for what may take long on a busy machine
NODE_DIES, LINK_DIES = 0.3, 0.6  # after these shares of the rounds


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Federation:
    """A SuperLink and SuperNodes on this machine.

    >>> with Federation(Path("runs/federated/processes"), nodes=2) as federation:  # doctest: +SKIP
    ...     federation.run(**{"num-server-rounds": 3}).wait()

    Args:
        folder: of logs, of the SuperLink's database and of Flower's own files.
        nodes: number of SuperNodes.
        throttled: numbers of those that get half of their time.
    """

    def __init__(self, folder: Path, nodes: int, throttled: tuple[int, ...] = ()) -> None:
        self.folder, self.nodes, self._throttled = folder, nodes, throttled
        self._link, self._started = free_port(), list[subprocess.Popen]()
        self.superlink: subprocess.Popen | None = None
        self.supernodes = dict[int, subprocess.Popen]()
        self._over = threading.Event()
        scripts = Path(sys.executable).parent
        self._environment = os.environ | {
            "FLWR_HOME": str(folder / "home"), "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE", "PATH": f"{scripts}:{os.environ['PATH']}",
        }  # fmt: skip
        (folder / "home").mkdir(parents=True)
        (folder / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "loop"\n\n[superlink.loop]\naddress = "127.0.0.1:{self._link}"\ninsecure = true\n'
        )

    def __enter__(self) -> "Federation":
        self.start_superlink()
        for number in range(self.nodes):
            self.start_supernode(number)
        threading.Thread(target=self._throttle, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for process in reversed(self._started):
            kill(process)

    def start_superlink(self) -> None:
        """Start the SuperLink, on the database of the one before."""
        self.superlink = self._start(
            "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self._link),
            "--database", str(self.folder / "state.db"),
        )  # fmt: skip
        wait_for(lambda: connects(self._link), 120)

    def start_supernode(self, number: int) -> None:
        """Start a SuperNode with its part of the data."""
        self.supernodes[number] = self._start(
            "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self._link}", "--host", "127.0.0.1",
            "--port", str(free_port()), "--node-config", f"partition-id={number} num-partitions={self.nodes}",
        )  # fmt: skip

    def run(self, **config: Any) -> subprocess.Popen:
        """Start the app with values of its configuration; the process ends when the run does."""
        pairs = " ".join(
            f'{key}="{v}"' if isinstance(v, str) else f"{key}={json.dumps(v)}" for key, v in config.items()
        )
        return self._start("flwr", "run", str(APP), "loop", "--stream", "--run-config", pairs)

    def logs(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))

    def _start(self, *command: str) -> subprocess.Popen:
        with (self.folder / f"{len(self._started):02}-{command[0]}.log").open("w") as log:
            # a group of its own, so that what it starts is killed and throttled with it
            process = subprocess.Popen(
                command, env=self._environment, stdout=log, stderr=log, cwd=self.folder, process_group=0
            )
        self._started.append(process)
        return process

    def _throttle(self) -> None:
        while not self._over.is_set():
            for sent in (signal.SIGSTOP, signal.SIGCONT):
                for number in self._throttled:
                    signal_group(self.supernodes[number], sent)
                time.sleep(HALF)


def kill(process: subprocess.Popen) -> None:
    """Kill a process and all that it started."""
    signal_group(process, signal.SIGCONT)
    signal_group(process, signal.SIGKILL)
    process.wait(30)


def signal_group(process: subprocess.Popen, number: signal.Signals) -> None:
    """Send a signal to a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def connects(port: int) -> bool:
    """Whether somebody listens on a port."""
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def wait_for(there: Callable[[], bool], seconds: float) -> None:
    """Wait for something.

    Raises:
        TimeoutError: if it does not come.
    """
    end = time.monotonic() + seconds
    while not there():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s")
        time.sleep(0.5)


def rounds_in(path: Path) -> list[dict[str, Any]]:
    """Finished rounds."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return []


def study(folder: Path, rounds: int) -> dict[str, Any]:
    """Train, kill, go on, and say what came of it."""
    out = folder / "rounds.json"
    began = time.monotonic()
    with Federation(folder, NODES, THROTTLED) as federation:
        config = {"num-server-rounds": rounds, "min-nodes": NODES - 1, "out": str(out), "timeout": TIMEOUT}
        config |= {"kept": str(folder / "kept.safetensors")}
        run = federation.run(**config)

        def at(number: int) -> None:
            wait_for(lambda: len(rounds_in(out)) > number or run.poll() is not None, PATIENCE)
            say(f"round {number}, {time.monotonic() - began:.0f} s")

        dies = round(NODE_DIES * rounds)
        at(dies - 1)
        time.sleep(4)
        kill(federation.supernodes[1])
        say("a node is killed")
        at(dies)
        federation.start_supernode(1)
        at(round(LINK_DIES * rounds) - 1)
        kill(federation.superlink)
        kill(run)
        say("the SuperLink is killed")
        federation.start_superlink()
        run = federation.run(**config)
        at(rounds)
        found = rounds_in(out)
        if len(found) <= rounds:
            print(federation.logs(), file=sys.stderr)
    return {"rounds": found, "seconds": time.monotonic() - began}


def hidden(folder: Path, rounds: int) -> dict[str, Any]:
    """Train with secure aggregation."""
    out = folder / "rounds.json"
    with Federation(folder, NODES, THROTTLED) as federation:
        config = {"num-server-rounds": rounds, "min-nodes": NODES, "out": str(out), "timeout": TIMEOUT}
        run = federation.run(**config, secure=True)
        wait_for(lambda: len(rounds_in(out)) > rounds or run.poll() is not None, PATIENCE)
        if len(found := rounds_in(out)) <= rounds:
            print(federation.logs(), file=sys.stderr)
    return {"secure": found}


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Federated training in real processes.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="0 keeps those that were measured before")
    parser.add_argument("--secure-rounds", type=int, default=3, help="0 keeps those that were measured before")
    options = parser.parse_args()
    folder, summary = OUT / "processes", OUT / "processes.json"
    for part, rounds in ((study, options.rounds), (hidden, options.secure_rounds)):
        if rounds:
            shutil.rmtree(folder, ignore_errors=True)
            known = json.loads(summary.read_text()) if summary.is_file() else {}
            summary.write_text(json.dumps(known | part(folder, rounds), indent=1) + "\n")
    found = json.loads(summary.read_text())
    for one in (*found.get("rounds", ()), *found.get("secure", ())):
        say(f"{one['round']:3} {one['real_seconds']:6.1f} s {one['modes']} {one['metrics']} {one['refused']}")


if __name__ == "__main__":
    main()
