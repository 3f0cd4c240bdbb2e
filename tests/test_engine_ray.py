"""Many machines: a real cluster of two nodes on this one; bytes are those of a local run, whoever dies meanwhile."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
import torch

from moqa.errors import MoqaError, Stopped
from moqa.execution import find_executor, on_ray
from moqa.methods import METHODS, Method
from moqa.planning import for_file, plan, read_plan
from moqa.profiling import profile
from moqa.quantization import quantize
from moqa.storage.artifact import write_json

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'moqa[ray]'")
# Ray leaves sockets to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
OPTIONS = {"include_dashboard": False, "object_store_memory": 100 * 2**20}
SMALL = {"samples": 6, "context": 32, "self_samples": 2}
# processes of the cluster never wait for each other by spinning
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


class Nodes:
    """The cluster of this file: a head and a second node, which a test may remove."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        self.cpus = torch.get_num_threads()
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": self.cpus, **OPTIONS})
        self.second = None

    @property
    def address(self):
        return self.cluster.address

    def both(self):
        if self.second is None:
            self.second = self.cluster.add_node(num_cpus=self.cpus, **OPTIONS)
        self.cluster.wait_for_nodes()

    def lose_second(self):
        lost, self.second = self.second, None
        self.cluster.remove_node(lost, allow_graceful=False)


@pytest.fixture(scope="module")
def nodes():
    found = Nodes()
    yield found
    ray.shutdown()
    found.cluster.shutdown()


@pytest.fixture
def engine(nodes):
    nodes.both()
    found = find_executor("ray", address=nodes.address)
    # a node that was lost is counted until its heartbeats are missed
    for _ in range(3000):
        if found.workers == 2:
            return found
        time.sleep(0.1)
    return pytest.fail(f"the cluster has {found.workers} workers")


@pytest.fixture(scope="module")
def profiled(tiny_model, texts, tmp_path_factory):
    given = [texts["wiki"], texts["novels"]]
    return profile(tiny_model, given, tmp_path_factory.mktemp("profile") / "tiny", **SMALL)


@pytest.fixture(scope="module")
def planned(profiled):
    return plan(profiled, strategy="uniform", widths=(3,))


@pytest.fixture(scope="module")
def whole(tiny_model, planned, profiled, tmp_path_factory):
    """What local runs make, by method."""
    root = tmp_path_factory.mktemp("local")
    return {
        name: contents(quantize(tiny_model, planned, root / name, method=name, profile=profiled)) for name in METHODS
    }


def contents(folder):
    """All files but the card for people, which names the model as it was typed."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "README.md")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def hung(mark, wanted=None):
    """Methods whose first call, on the `wanted` node if one is named, says who works at it and hangs."""

    def hang(run):
        def slow(*given):
            from pathlib import Path

            import ray

            def is_first(claim):
                try:
                    claim.touch(exist_ok=False)  # workers may come here at the same moment
                except FileExistsError:
                    return False
                return True

            here = ray.get_runtime_context().get_node_id()
            if wanted in (None, here) and is_first(Path(mark).with_suffix(".claimed")):
                Path(mark).with_suffix(".new").write_text(f"{os.getpid()} {here}")
                Path(mark).with_suffix(".new").rename(mark)
                time.sleep(300)
            return run(*given)

        return slow

    return {
        name: replace(found, run=hang(found.run), store=found.store and hang(found.store))
        for name, found in METHODS.items()
    }


def when_at_work(mark, act):
    """Do something once a worker hangs: its process and its node are known then."""

    def wait():
        while not mark.exists():
            time.sleep(0.05)
        act(*mark.read_text().split())

    thread = Thread(target=wait, daemon=True)
    thread.start()
    return thread


class TestBytes:
    def test_a_profile(self, tiny_model, texts, profiled, engine, tmp_path):
        heard = []
        found = profile(
            tiny_model, [texts["wiki"], texts["novels"]], tmp_path / "tiny", engine=engine,
            report=lambda step, done, total, **facts: heard.append((step, facts)), **SMALL,
        )  # fmt: skip
        assert contents(found.folder) == contents(profiled.folder)
        assert ("cluster", {"nodes": 2, "workers": 2, "threads": torch.get_num_threads()}) in heard
        assert list(tmp_path.iterdir()) == [tmp_path / "tiny"]

    @pytest.mark.parametrize("method", sorted(METHODS))
    def test_a_checkpoint(self, method, tiny_model, planned, profiled, whole, engine, tmp_path):
        heard = []
        out = quantize(
            tiny_model, planned, tmp_path / "out", method=method, profile=profiled, engine=engine,
            report=lambda step, done, total, **facts: heard.append(facts.get("expert")),
        )  # fmt: skip
        assert contents(out) == whole[method]
        # what reads every layer for every distribution is cut, so that both nodes have work
        assert (3 in heard) == METHODS[method].needs_data
        assert list(tmp_path.iterdir()) == [out]

    def test_one_command_does_it_all(self, tiny_model, nodes, engine, tmp_path, moqa_command):
        text = tmp_path / "text.txt"
        text.write_text("The cat sat on the mat. " * 4000)
        for folder, options in (("local", ()), ("ray", ("--engine", "ray", "--ray-address", nodes.address))):
            code, _, stderr = moqa_command(
                "quantize", tiny_model, "--data", f"t={text}", "--strategy", "uniform", "--widths", "3", "--samples", 4,
                "--context", 32, "--self-samples", 0, "--no-proof", "-o", tmp_path / folder / "out", *options,
            )  # fmt: skip
            assert code == 0, stderr
            assert ("moqa: cluster 1/1, nodes 2, workers 2" in stderr) == (folder == "ray")
        assert contents(tmp_path / "ray" / "out.profile") == contents(tmp_path / "local" / "out.profile")
        assert contents(tmp_path / "ray" / "out") == contents(tmp_path / "local" / "out")


class TestLosses:
    @pytest.mark.parametrize("method", sorted(METHODS))
    def test_a_worker_that_is_killed(self, method, tiny_model, planned, profiled, whole, engine, tmp_path, monkeypatch):
        mark = tmp_path / "mark"
        monkeypatch.setitem(METHODS, method, hung(mark)[method])
        killer = when_at_work(mark, lambda pid, _: os.kill(int(pid), signal.SIGKILL))
        out = quantize(tiny_model, planned, tmp_path / "out", method=method, profile=profiled, engine=engine)
        assert contents(out) == whole[method]
        assert not killer.is_alive()

    def test_a_node_that_is_lost_while_it_profiles(
        self, tiny_model, texts, profiled, nodes, engine, tmp_path, monkeypatch
    ):
        mark = tmp_path / "mark"
        lost = nodes.second.node_id
        monkeypatch.setitem(METHODS, "gptq", hung(mark, lost)["gptq"])
        killer = when_at_work(mark, lambda *_: nodes.lose_second())
        found = profile(tiny_model, [texts["wiki"], texts["novels"]], tmp_path / "tiny", engine=engine, **SMALL)
        assert contents(found.folder) == contents(profiled.folder)
        assert mark.read_text().endswith(lost)
        assert not killer.is_alive()

    def test_all_nodes_that_are_lost_leave_what_is_done(
        self, tiny_model, planned, profiled, whole, engine, tmp_path, monkeypatch
    ):
        # a cluster without enough CPUs is one without nodes
        def report(step, done, total, **_):
            if step == "quantize" and done == 1:
                engine._threads = 10**6

        monkeypatch.setattr(on_ray, "_CHECK_SECONDS", 0.5)
        threads = engine._threads
        with pytest.raises(Stopped, match="no node of the Ray cluster is left; the same command continues"):
            quantize(tiny_model, planned, tmp_path / "out", profile=profiled, engine=engine, report=report)
        engine._threads = threads
        out = quantize(tiny_model, planned, tmp_path / "out", profile=profiled)
        assert contents(out) == whole["gptq"]


class TestGoingOn:
    def test_here_what_began_there_and_was_killed(self, tiny_model, planned, profiled, whole, engine, nodes, tmp_path):
        write_json(for_file(planned, tmp_path / "plan.json"), tmp_path / "plan.json")
        command = [
            sys.executable, "-m", "moqa", "quantize", str(tiny_model), "--plan", str(tmp_path / "plan.json"),
            "--profile", str(profiled.folder), "-o", str(tmp_path / "out"), "--engine", "ray", "--ray-address",
            nodes.address,
        ]  # fmt: skip
        first = tmp_path / ".out.partial" / "steps" / "layer-0.json"
        with subprocess.Popen(command, stderr=subprocess.PIPE) as driver:
            while not first.exists():
                assert driver.poll() is None, driver.stderr.read()
                time.sleep(0.02)
            driver.kill()
        assert not (tmp_path / "out").exists()
        shard = min((tmp_path / ".out.partial" / "result").glob("model-*-of-*"), key=lambda path: path.stat().st_mtime)
        stamp = shard.stat().st_mtime_ns
        out = quantize(tiny_model, read_plan(tmp_path / "plan.json"), tmp_path / "out", profile=profiled)
        assert contents(out) == whole["gptq"]
        assert (out / shard.name).stat().st_mtime_ns == stamp

    def test_there_what_began_here(self, tiny_model, planned, profiled, whole, engine, tmp_path):
        def stop(step, done, total, **_):
            if done == 1:
                raise Stopped

        with pytest.raises(Stopped):
            quantize(tiny_model, planned, tmp_path / "out", profile=profiled, report=stop)
        out = quantize(tiny_model, planned, tmp_path / "out", profile=profiled, engine=engine)
        assert contents(out) == whole["gptq"]


class TestMistakes:
    def test_a_mistake_on_a_worker_is_the_users(self, tiny_model, planned, profiled, engine, tmp_path, monkeypatch):
        def refuse(job):
            raise MoqaError("--method gptq", "does not like this")

        monkeypatch.setitem(METHODS, "gptq", Method("gptq", refuse))
        with pytest.raises(MoqaError) as caught:
            quantize(tiny_model, planned, tmp_path / "out", profile=profiled, engine=engine)
        assert str(caught.value) == "--method gptq: does not like this"
        assert list(tmp_path.iterdir()) == []

    def test_a_bug_on_a_worker_keeps_its_traceback(self, tiny_model, planned, profiled, engine, tmp_path, monkeypatch):
        monkeypatch.setitem(METHODS, "gptq", Method("gptq", lambda job: job.nothing))
        with pytest.raises(AttributeError, match=r"quantize_piece[\s\S]*has no attribute 'nothing'"):
            quantize(tiny_model, planned, tmp_path / "out", profile=profiled, engine=engine)

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"versions": {"torch": "1.0"}}, r"node \S+ \(\w+\) has torch 2\.\S+, this process has 1\.0: all machines"),
            ({"shared": Path("/nowhere/token")}, r"node \S+ \(\w+\) does not see /nowhere: all machines"),
            ({"model": Path("/nowhere/model")}, r"node \S+ \(\w+\) has no model in /nowhere/model"),
            ({"fingerprint": "0"}, r"node \S+ \(\w+\) has another model in"),
        ],
        ids=["version", "output", "model", "another"],
    )
    def test_a_node_that_differs(self, changed, said, tiny_model, planned, profiled, engine, tmp_path, monkeypatch):
        from dataclasses import replace

        from moqa.execution.workspace import WorkspaceAddress

        real = WorkspaceAddress.here

        def here(model, shared):
            found = real(model, shared)
            return replace(found, **(changed | {"versions": found.versions | changed.get("versions", {})}))

        monkeypatch.setattr(WorkspaceAddress, "here", here)
        with pytest.raises(MoqaError, match=said):
            quantize(tiny_model, planned, tmp_path / "out", profile=profiled, engine=engine)
        assert list(tmp_path.iterdir()) == []

    def test_more_threads_than_any_node_lends(self, engine, nodes):
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        with pytest.raises(MoqaError, match=rf"no node .* offers {threads + 1} CPUs.* largest offers {threads}"):
            find_executor("ray", address=nodes.address)


def free_port():
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        return here.getsockname()[1]


class TestWithoutACluster:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--engine", "spark"), "--engine spark is unknown: there are local, ray"),
            (("--ray-address", "10.0.0.1:6379"), "--ray-address 10.0.0.1:6379 is for --engine ray"),
            (("--engine", "ray"), "(Connection refused): start one with `ray start --head`"),
            (("--engine", "ray", "--ray-address", "head"), "--ray-address head is not HOST:PORT"),
            (("--engine", "ray", "--ray-address", f"127.0.0.1:{free_port()}"), "(Connection refused): start one"),
        ],
    )
    @pytest.mark.parametrize("command", ["profile", "quantize"])
    def test_one_line(self, command, options, said, tiny_model, tmp_path, moqa_command, monkeypatch):
        ray.shutdown()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
        given = (tiny_model, "--data", "t=text.txt", "-o", tmp_path / "out", *options)
        code, stdout, stderr = moqa_command(command, *given)
        assert (code, stdout) == (2, "")
        assert said in stderr
        assert stderr.count("\n") == 1
        assert list(tmp_path.iterdir()) == []

    def test_without_ray(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(MoqaError, match=r"--engine ray needs Ray: pip install 'moqa\[ray\]'"):
            find_executor("ray")

    def test_local_work_does_not_import_it(self):
        script = (
            "import sys, moqa.quantization, moqa.execution; moqa.execution.find_executor(); print('ray' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
        assert done.stdout.strip() == "False"
