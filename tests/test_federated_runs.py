"""Federated training from start to end: Flower's messages, strategy and client mod in one process, and real ones."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import moqa.federated.flower as flower
from moqa.errors import MoqaError
from moqa.federated import Experiment, FedHQ, local, measured, mod, run
from moqa.federated.flower import ArrayRecord, ClientApp, Message, MetricRecord, RecordDict
from moqa.federated.local_grid import LocalGrid
from moqa.federated.order import FACTS
from moqa.federated.roofline import Machine, SimulatedClock, Work
from moqa.federated.settings import read_experiment

CLIENTS = 5
NODES = (17, 2**63 + 5, 3 * 2**61, 2**64 - 1, 99)  # numbers as Flower draws them
INPUTS = torch.randn(CLIENTS, 192, 64, generator=torch.manual_seed(0))
LABELS = (INPUTS @ torch.randn(64, 4, generator=torch.manual_seed(1))).argmax(-1)


def network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def app_with(change=None, said=None, network=network, data=lambda client: 192, mods=None) -> ClientApp:
    """A user's Flower app.

    Args:
        change: what a bad client does to its update: of reply, client and round.
        said: what a client says of itself: of its facts and number; by default what the simulated clock says.
        network: makes the model.
        data: number of samples of a client.
        mods: instead of ours.
    """

    def spoilt(message, context, call_next):
        reply = call_next(message, context)
        if change is not None and message.metadata.message_type.startswith("train"):
            change(reply, context.node_config["partition-id"], int(message.content["config"]["server-round"]))
        return reply

    app = ClientApp(mods=[spoilt, mod] if mods is None else mods)

    def loaded(message, context):
        model, client = network(), int(context.node_config["partition-id"])
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        parts = range(0, data(client), 32)
        return model, [(INPUTS[client, at : at + 32], LABELS[client, at : at + 32]) for at in parts]

    @app.train()
    def train(message, context):
        model, batches = loaded(message, context)
        with local(model, message, probe=batches[0]):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for inputs, labels in batches * 2:
                optimizer.zero_grad()
                cross_entropy(model(inputs), labels).backward()
                optimizer.step()
        content = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": 192, "right": 0.5}),
        }
        return Message(RecordDict(content), reply_to=message)

    @app.query("moqa")
    def measure(message, context):
        model, batches = loaded(message, context)
        reply, client = measured(message, model, batches), context.node_config["partition-id"]
        facts = reply.content[FACTS]
        for kind in ("fp", "ptq", "qat"):
            facts[f"seconds.{kind}"] = clock().per_sample(client, kind)
        if said is not None:
            said(facts, client)
        return reply

    @app.evaluate()
    def evaluate(message, context):
        model, batches = loaded(message, context)
        with torch.no_grad():
            right = np.mean([(model(x).argmax(-1) == y).float().mean().item() for x, y in batches])
        return Message(
            RecordDict({"metrics": MetricRecord({"num-examples": 192, "right": float(right)})}), reply_to=message
        )

    return app


def clock(slowest: float = 8.0) -> SimulatedClock:
    works = {"fp": Work((1e6,), (0.0,)), "ptq": Work((1e6,), (0.0,)), "qat": Work((2e6,), (0.0,))}
    machine = Machine(flops=1e9, bandwidth=1e9, link=1e6)
    factors = np.geomspace(1, slowest, CLIENTS).tolist()
    return SimulatedClock([machine.slower(factor) for factor in factors], works)


def right(arrays: ArrayRecord) -> float:
    model = network()
    model.load_state_dict(arrays.to_torch_state_dict())
    with torch.no_grad():
        return (model(INPUTS.flatten(0, 1)).argmax(-1) == LABELS.flatten()).float().mean().item()


def trained(app: ClientApp, rounds: int = 4, start=None, **options):
    strategy = FedHQ(**{"bits": 3, "fraction_evaluate": 0.0, "seed": 1, "clock": clock(), "link": 1e6, **options})
    result = strategy.start(LocalGrid(app, CLIENTS), ArrayRecord((start or network)().state_dict()), num_rounds=rounds)
    return strategy, result


class TestFedHQ:
    @pytest.mark.parametrize("allocation", ["fp", "ptq", "qat", "random-hybrid", "coarse", "coarse+fine"])
    def test_learns_with_every_allocation(self, allocation):
        strategy, result = trained(app_with(), allocation=allocation, clock=clock(), link=1e6)
        assert right(result.arrays) > right(ArrayRecord(network().state_dict())) + 0.3
        used = {kind for one in strategy.rounds for kind in one.modes.values()}
        assert used <= ({allocation} if allocation in ("fp", "ptq", "qat") else {"ptq", "qat"})
        assert not any(one.refused for one in strategy.rounds)

    def test_bytes_are_those_of_the_messages_and_far_below_full_precision(self):
        size = sum(weight.numel() * 4 for weight in network().parameters())
        packed, _ = trained(app_with(), rounds=1, allocation="ptq", bits=2)
        plain, _ = trained(app_with(), rounds=1, allocation="fp")
        assert plain.rounds[1].uplink_bytes > CLIENTS * size
        # a sixteenth, scales, the small tensors, and what Flower and the names of tensors take
        assert packed.rounds[1].uplink_bytes < CLIENTS * (size / 16 * 1.2 + 3000)
        assert packed.rounds[1].downlink_bytes < CLIENTS * (size / 4 * 1.2 + 3500)

    def test_slow_clients_do_not_train_with_rounding(self):
        strategy, _ = trained(app_with(), rounds=1, allocation="coarse", clock=clock(), link=1e6, round_seconds=1.0)
        # 192 samples in 0.2 s on the fastest, and 8 times slower on the slowest
        assert strategy.rounds[1].modes == {0: "qat", 1: "qat", 2: "ptq", 3: "ptq", 4: "ptq"}
        assert strategy.rounds[1].seconds == pytest.approx(192 * 8e-3, rel=0.05)

    def test_evaluates_on_clients_with_packed_arrays(self):
        _, result = trained(app_with(), rounds=2, fraction_evaluate=1.0, min_evaluate_nodes=2, clock=clock())
        assert result.evaluate_metrics_clientapp[2]["right"] > 0.3
        assert result.train_metrics_clientapp[2]["right"] > 0.3  # the facts that moqa adds are not averaged

    def test_goes_on_from_a_state_to_the_same_numbers(self):
        whole, result = trained(app_with(), rounds=4, clock=clock(), link=1e6)
        grid = LocalGrid(app_with(), CLIENTS)
        first = FedHQ(3, seed=1, clock=clock(), link=1e6, fraction_evaluate=0.0)
        start = ArrayRecord(network().state_dict())
        # the fine stage plans with the number of rounds: the same run, stopped
        half = first.start(grid, start, num_rounds=4, on_round=lambda one, _: one.round == 2)
        kept, again = grid.residuals(), LocalGrid(app_with(), CLIENTS)
        again.restore(kept)
        second = FedHQ(3, seed=1, clock=clock(), link=1e6, fraction_evaluate=0.0)
        second.restore(json.loads(json.dumps(first.state())))
        rest = second.start(again, half.arrays, num_rounds=4)
        assert [one.modes for one in second.rounds] == [one.modes for one in whole.rounds]
        for name, tensor in rest.arrays.to_torch_state_dict().items():
            assert torch.equal(tensor, result.arrays.to_torch_state_dict()[name])

    def test_goes_on_from_its_file_with_nodes_that_have_other_numbers(self, tmp_path):
        class Moved(LocalGrid):
            """Clients that come back as other nodes."""

            def __init__(self, app, clients):
                super().__init__(app, clients)
                self._contexts = {NODES[number]: context for number, context in self._contexts.items()}

        kept, options = tmp_path / "rounds.safetensors", {"seed": 1, "clock": clock(), "link": 1e6}
        first = FedHQ(3, fraction_evaluate=0.0, allocation="coarse", **options)
        first.start(LocalGrid(app_with(), CLIENTS), ArrayRecord(network().state_dict()), num_rounds=2, kept=kept)
        second = FedHQ(3, fraction_evaluate=0.0, allocation="coarse", **options)
        result = second.start(
            Moved(app_with(), CLIENTS), ArrayRecord(network().state_dict()), num_rounds=4, kept=kept
        )  # fmt: skip
        assert [one.round for one in second.rounds] == [0, 1, 2, 3, 4]
        assert {client.node for client in second.clients.values()} == set(NODES)
        # they keep their numbers, and so their modes
        assert [one.modes for one in second.rounds[1:]] == [second.rounds[1].modes] * 4
        assert right(result.arrays) > 0.6

    def test_a_file_of_something_else(self, tmp_path):
        (tmp_path / "kept").write_text("x")
        with pytest.raises(MoqaError, match=r"has no finished rounds .*: remove it to begin anew"):
            FedHQ(3).start(LocalGrid(app_with(), 2), ArrayRecord(network().state_dict()), kept=tmp_path / "kept")

    def test_counts_are_noisy_if_asked_for(self):
        exact, _ = trained(app_with(), rounds=0)
        noisy, _ = trained(app_with(), rounds=0, epsilon=0.5)
        counts = [next(iter(one.clients.values())).histogram for one in (exact, noisy)]
        assert sum(counts[0]) == 192
        assert counts[0] != counts[1]

    def test_the_allocator_takes_little_time(self):
        strategy, _ = trained(app_with(), rounds=6, clock=clock(), link=1e6)
        # work, not the clock: the regression is fitted on so few numbers
        assert len(strategy.fine.seen) == 6 * CLIENTS

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"bits": 5}, "is not supported"), ({"allocation": "best"}, "allocation best is unknown"),
            ({"trim": 0.5}, "trim=0.5 is not a share"), ({"upload_bits": [7]}, "upload_bits"),
        ],
    )  # fmt: skip
    def test_mistakes_are_named(self, options, said):
        with pytest.raises(MoqaError, match=said):
            FedHQ(**options)


class TestBadInput:
    def test_a_client_without_data_is_named_and_the_others_train(self):
        strategy, _ = trained(app_with(data=lambda client: 0 if client == 1 else 192), rounds=1)
        assert "this client has no data" in strategy.rounds[0].refused[0]
        assert sorted(strategy.rounds[1].modes) == [0, 2, 3, 4]

    def test_a_model_that_cannot_be_rounded(self):
        class Last(nn.Module):
            def forward(self, found):
                return found[0]

        def odd() -> nn.Module:
            return nn.Sequential(nn.LSTM(64, 4), Last())

        with pytest.raises(MoqaError, match=r"no client can take part: .*0 \(LSTM\) has weight_ih_l0"):
            trained(app_with(network=odd), rounds=1, start=odd)

    def test_an_app_without_the_mod(self):
        with pytest.raises(MoqaError, match="no client can take part"):
            trained(app_with(mods=[]), rounds=1)

    @pytest.mark.parametrize("found", ["1.40.0", "1.4.1", "2.0"])
    def test_another_flower(self, monkeypatch, found):
        monkeypatch.setattr(flower, "version", lambda name: found)
        with pytest.raises(MoqaError, match=rf"Flower {found} was not tested .*: pip install 'flwr==1.41.\*'"):
            flower.check_flower()


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name, words in {
        "one": "the cat sat on the mat ",
        "two": "der Hund liegt im Haus ",
        "three": "x = [1, 2, 3] ",
    }.items():
        (folder / f"{name}.calib.txt").write_text(words * 200)
        (folder / f"{name}.test.txt").write_text(words * 20)
    return folder


@pytest.fixture
def experiment(texts, tmp_path) -> Path:
    path = tmp_path / "one.toml"
    path.write_text(
        f'data = "text"\nfolder = "{texts}"\nclients = 3\nheterogeneity = 8\nrounds = 3\nsamples = 120\n'
        "test_samples = 12\nrate = 0.3\nbatch = 8\ntarget = 0.99\n"
    )
    return path


class TestRun:
    def test_writes_model_record_and_page(self, experiment, tmp_path, moqa_command):
        code, out, err = moqa_command("federated", "run", experiment, "-o", tmp_path / "out")
        assert code == 0, err
        assert "moqa: warning: the target of 99.0% was not reached, the best is" in err
        assert "accuracy as stored" in out
        record = json.loads((tmp_path / "out" / "federated.json").read_text())
        accuracies = [one["metrics"]["accuracy"] for one in record["rounds"]]
        assert accuracies[-1] > accuracies[0]
        page = (tmp_path / "out" / "report.html").read_text()
        assert "was not reached in 3 rounds" in page
        assert "Course of the training" in page
        assert (tmp_path / "out" / "model.safetensors").is_file()
        assert moqa_command("federated", "run", experiment, "-o", tmp_path / "out")[0] == 2

    def test_goes_on_after_a_kill_to_the_same_record(self, experiment, tmp_path):
        wanted = read_experiment(experiment)
        whole, steps = run(wanted, tmp_path / "whole"), []

        def killed(step, done, total, **facts):
            steps.append(done)
            if done == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(wanted, tmp_path / "out", report=killed)
        steps.clear()
        found = run(wanted, tmp_path / "out", report=lambda step, done, total, **facts: steps.append(done))
        assert steps == [3, 4]
        assert [one.metrics for one in found.rounds] == [one.metrics for one in whole.rounds]
        assert found.uplink_bytes == whole.uplink_bytes
        model = "model.safetensors"
        assert (tmp_path / "out" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()

    def test_data_that_are_missing(self, tmp_path):
        for data, said in {"fashion-mnist": "apt-get", "cifar10": "recipes/cifar10.py", "text": "has no files"}.items():
            with pytest.raises(MoqaError, match=said):
                run(Experiment(data=data, folder=tmp_path), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "rounds", "secure"), [(2, 3, False), (3, 1, True)])
def test_real_processes(tmp_path, monkeypatch, nodes, rounds, secure):
    """A SuperLink and SuperNodes with a Flower app that has the five lines of docs/federated.md."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    from federated_processes import Federation, rounds_in

    out = tmp_path / "rounds.json"
    config = {"num-server-rounds": rounds, "min-nodes": nodes, "secure": secure, "out": str(out)}
    with Federation(tmp_path / "processes", nodes) as federation:
        federation.run(**config).wait(600)
        found = rounds_in(out)
        assert found, federation.logs()
    assert [one["round"] for one in found] == list(range(rounds + 1))
    assert all(len(one["modes"]) == nodes and not one["refused"] for one in found[1:])
    assert found[-1]["metrics"]["accuracy"] > found[0]["metrics"]["accuracy"] + 0.2


@pytest.mark.slow
def test_flowers_simulation(experiment, tmp_path):
    experiment.write_text(experiment.read_text() + 'engine = "ray"\n')
    # in a process of its own: Ray leaves children to the process that started it
    command = [sys.executable, "-m", "moqa", "federated", "run", str(experiment), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rounds = json.loads((tmp_path / "out" / "federated.json").read_text())["rounds"]
    assert [len(one["modes"]) for one in rounds] == [0, 3, 3, 3]
    assert rounds[-1]["metrics"]["accuracy"] > rounds[0]["metrics"]["accuracy"]
