"""Federated training, part by part: packing, refusals, allocation, aggregation, skew, roofline, settings."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from moqa.errors import MoqaError
from moqa.federated.aggregate import combine
from moqa.federated.allocation import choices_of, first_choice, options_of
from moqa.federated.clients import dirichlet
from moqa.federated.coarse import Limits, ModeOptions
from moqa.federated.measure import batch_loss, measure
from moqa.federated.modes import LocalMode, in_mode, rounded
from moqa.federated.records import ClientRecord
from moqa.federated.roofline import Machine, SimulatedClock, work_of
from moqa.federated.settings import Experiment, read_experiment
from moqa.federated.simulation import clock_of, optimizers_of
from moqa.federated.skew import jensen_shannon, private, skews
from moqa.federated.updates import Packing, UpdateError, packed_update

LIKE = {
    "w": torch.zeros(40, 64),
    "conv": torch.zeros(8, 16, 3, 3),
    "b": torch.zeros(40),
    "n": torch.zeros((), dtype=torch.int64),
}


def values(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(like.shape, generator=generator) for name, like in LIKE.items() if name != "n"}
    return found | {"n": torch.tensor(3)}


class TestPacking:
    @pytest.mark.parametrize("bits", [8, 4, 3, 2, 32])
    def test_bytes_are_those_that_were_announced(self, bits):
        packing = Packing(LIKE, bits)
        data = packing.pack(values())
        assert len(data) == packing.length
        got = packing.unpack(data)
        assert {name: tensor.shape for name, tensor in got.items()} == {name: like.shape for name, like in LIKE.items()}
        assert torch.equal(got["b"], values()["b"])
        assert got["n"] == 3
        error = (got["w"] - values()["w"]).square().mean()
        assert error < {8: 1e-3, 4: 0.03, 3: 0.08, 2: 0.3, 32: 1e-12}[bits]

    def test_packed_bits_are_packed(self):
        weights = sum(LIKE[name].numel() for name in ("w", "conv"))
        assert set(load(Packing(LIKE, 2).pack(values()))) == {"w.p0", "w.scale", "conv.p0", "conv.scale", "b", "n"}
        # 2 bits and a scale of 16 bits per 64, the last tiles padded to 1024 numbers; small tensors and names
        assert Packing(LIKE, 2).length < (weights + 2048) * (2 + 16 / 64) / 8 + 1000
        assert Packing(LIKE, 32).length > weights * 4

    @settings(max_examples=25)
    @given(bits=st.sampled_from([2, 3, 4, 8]), size=st.integers(1, 3000), seed=st.integers(0, 99))
    def test_any_size_and_what_is_left_add_up(self, bits, size, seed):
        generator = torch.Generator().manual_seed(seed)
        after = {"w": torch.randn(1, size, generator=generator)}
        packing = Packing({"w": torch.zeros(1, size)}, bits)
        data, left = packed_update(packing, {"w": torch.zeros(1, size)}, after, {})
        got = packing.unpack(data)["w"] + left.get("w", 0.0)
        assert torch.allclose(got, after["w"], atol=1e-6)

    def test_error_feedback_makes_the_sum_of_updates_exact(self):
        packing, target = Packing({"w": torch.zeros(16, 64)}, 2), torch.randn(16, 64, generator=torch.manual_seed(0))
        sums = {True: torch.zeros(16, 64), False: torch.zeros(16, 64)}
        for feedback, total in sums.items():
            left = {}
            for _ in range(20):
                data, rest = packed_update(packing, {"w": torch.zeros(16, 64)}, {"w": target}, left)
                total += packing.unpack(data)["w"] / 20
                left = rest if feedback else {}
        errors = {feedback: (total - target).norm().item() for feedback, total in sums.items()}
        assert errors[True] < errors[False] / 4

    def test_a_diverged_training_is_named(self):
        after = values() | {"w": torch.full((40, 64), float("nan"))}
        with pytest.raises(MoqaError, match="training left w with numbers that are not finite"):
            packed_update(Packing(LIKE, 2), LIKE, after, {})


def tampered(**changes):
    def change(data: bytes) -> bytes:
        stored = load(data)
        return save({**stored, **{name: edit(stored[name]) for name, edit in changes.items()}})

    return change


HOSTILE = {
    "empty": (lambda data: b"", "0 bytes instead of"),
    "short": (lambda data: data[:-1], "bytes instead of"),
    "oversized": (lambda data: data + bytes(10**6), "bytes instead of"),
    "noise": (lambda data: bytes(len(data)), "not safetensors"),
    "huge header": (lambda data: (2**63).to_bytes(8, "little") + data[8:], "not safetensors"),
    "nan": (tampered(b=lambda t: t * float("nan")), "b has numbers that are not finite"),
    "infinite scales": (lambda data: tampered(**{"w.scale": lambda t: t + float("inf")})(data), "w.scale has numbers"),
    "negative scales": (lambda data: tampered(**{"w.scale": lambda t: -t})(data), "w has negative scales"),
    "another dtype": (tampered(b=lambda t: t.view(torch.int32)), "b has int32|bytes instead"),
}


class TestHostileUpdates:
    @pytest.mark.parametrize("kind", HOSTILE)
    def test_are_refused_by_name(self, kind):
        packing = Packing(LIKE, 2)
        change, said = HOSTILE[kind]
        with pytest.raises(UpdateError, match=said):
            packing.unpack(change(packing.pack(values())))

    def test_a_wrong_shape_of_equal_length(self):
        packing = Packing({"a": torch.zeros(4, 2)}, 32)
        data = Packing({"a": torch.zeros(2, 4)}, 32).pack({"a": torch.zeros(2, 4)})
        with pytest.raises(UpdateError, match=r"a has float32 \[2, 4\], not float32 \[4, 2\]"):
            packing.unpack(data)

    def test_another_tensor(self):
        data = Packing({"z": torch.zeros(4, 2)}, 32).pack({"z": torch.zeros(4, 2)})
        with pytest.raises(UpdateError, match="unexpected or missing tensor a"):
            Packing({"a": torch.zeros(4, 2)}, 32).unpack(data)


class TestModes:
    def test_training_moves_the_exact_weights_and_leaves_a_plain_model(self):
        model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
        names, before = sorted(model.state_dict()), model[0].weight.detach().clone()
        with in_mode(model, LocalMode("qat", 2)):
            assert len(model[0].weight[0].unique()) <= 4
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            model(torch.randn(8, 64)).square().sum().backward()
            optimizer.step()
        assert sorted(model.state_dict()) == names
        assert not torch.equal(model[0].weight, before)
        assert len(model[0].weight[0].unique()) > 4
        assert [type(part) for part in model.modules()] == [nn.Sequential, nn.Linear, nn.ReLU, nn.Linear]

    def test_ptq_trains_exactly_and_is_rounded_afterwards(self):
        model = nn.Linear(64, 8)
        with in_mode(model, LocalMode("ptq", 2)):
            assert len(model.weight[0].unique()) > 4
        with rounded(model, LocalMode("ptq", 2)):
            assert len(model.weight[0].unique()) <= 4

    def test_a_model_that_cannot_be_rounded_is_named(self):
        with (
            pytest.raises(MoqaError, match=r"0 \(LSTM\) has weight_ih_l0"),
            in_mode(nn.Sequential(nn.LSTM(8, 8)), LocalMode("qat", 3)),
        ):
            pass

    @pytest.mark.parametrize(("kind", "bits"), [("qat", 5), ("fp", 8), ("ptq", 32), ("int", 8)])
    def test_modes_that_do_not_exist(self, kind, bits):
        with pytest.raises(MoqaError, match=r"supported|unknown"):
            LocalMode(kind, bits)


class TestMeasure:
    def test_labels_are_counted_and_the_model_stays(self):
        model = nn.Sequential(nn.Linear(64, 3))
        before = model[0].weight.detach().clone()
        batches = [(torch.randn(8, 64), torch.tensor([0, 0, 0, 0, 0, 0, 2, 2])) for _ in range(3)]
        found = measure(model, batches, bits=2)
        assert (found.samples, found.histogram) == (24, [18.0, 0.0, 6.0])
        assert set(found.per_sample) == {"fp", "ptq", "qat"}
        assert min(found.per_sample.values()) > 0
        assert 0 < found.damage < 1
        assert torch.equal(model[0].weight, before)
        assert measure(model, batches, bits=8).damage < found.damage

    def test_tokens_of_text_are_counted_in_buckets(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(600, 600)

            def forward(self, input_ids, labels):
                logits = self.table(input_ids)
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
                return type("Output", (), {"loss": loss, "logits": logits})

        tokens = torch.tensor([[1, 257, 513]])
        found = measure(Model(), [{"input_ids": tokens, "labels": torch.tensor([[1, 257, -100]])}], bits=4)
        assert found.histogram == [0.0, 2.0]

    def test_noise_hides_single_samples(self):
        batches = [(torch.randn(8, 64), torch.zeros(8, dtype=torch.int64))]
        found = [measure(nn.Linear(64, 3), batches, bits=2, epsilon=1.0).histogram for _ in range(2)]
        assert found[0] != found[1]

    def test_a_client_without_data(self):
        with pytest.raises(MoqaError, match="this client has no data"):
            measure(nn.Linear(4, 2), [], bits=2)


class TestSkew:
    def test_ends(self):
        assert jensen_shannon(np.array([4, 4]), np.array([1, 1])) == 0
        assert jensen_shannon(np.array([4, 0]), np.array([0, 1])) == 1

    @given(st.lists(st.integers(0, 50), min_size=2, max_size=6), st.lists(st.integers(0, 50), min_size=2, max_size=6))
    def test_symmetric_and_bounded(self, one, other):
        size = min(len(one), len(other))
        a, b = np.array(one[:size]) + 1, np.array(other[:size]) + 1
        assert 0 <= jensen_shannon(a, b) <= 1
        assert jensen_shannon(a, b) == pytest.approx(jensen_shannon(b, a))

    def test_skewed_clients_stand_out(self):
        found = skews(np.array([[10, 10], [10, 10], [20, 0]]))
        assert found[2] > 3 * found[0]

    def test_private_counts_are_never_negative(self):
        assert private(np.zeros(100), 0.1, np.random.default_rng(0)).min() == 0


def clients(count: int, seconds: list[float] | None = None, damage: float = 0.3) -> list[ClientRecord]:
    each = seconds or [0.01] * count
    return [
        ClientRecord(
            number=index, node=100 + index, samples=100, per_sample={"fp": s, "ptq": s, "qat": 2 * s},
            histogram=[10.0, 10.0], damage=damage,
        )
        for index, s in enumerate(each)
    ]  # fmt: skip


class TestCoarse:
    def options(self, those):
        choices = choices_of("coarse", [3])
        return options_of(those, choices, [1000] * len(choices), link=None)

    def test_slack_is_used_and_slow_clients_do_not_hold_up_the_round(self):
        options = self.options(clients(4, [0.01, 0.01, 0.02, 0.08]))
        assert options.deadline() == pytest.approx(8.0)
        assert first_choice("coarse", options, Limits(), seed=0).tolist() == [1, 1, 1, 0]

    def test_where_rounding_does_no_harm_nobody_trains_with_it(self):
        options = self.options(clients(4, damage=0.0))
        assert first_choice("coarse", options, Limits(), seed=0).tolist() == [0, 0, 0, 0]

    def test_where_it_does_great_harm_all_do(self):
        options = self.options(clients(4, damage=0.9))
        assert first_choice("coarse", options, Limits(), seed=0).tolist() == [1, 1, 1, 1]

    def test_a_deadline_that_a_client_cannot_keep(self):
        options = self.options(clients(2, [0.01, 0.08]))
        assert options.choose(Limits(seconds=3.0)).tolist() == [1, 0]

    def test_bytes_are_a_capacity_of_all(self):
        options = ModeOptions(np.array([[1.0, 2.0]] * 3), np.ones((3, 2)), np.array([[10, 20]] * 3))
        assert options.choose(Limits(bytes=40)).sum() == 1
        with pytest.raises(MoqaError, match="20 bytes a round are too few: at least 30"):
            options.choose(Limits(bytes=20))

    def test_random_hybrid_has_as_many(self):
        options = self.options(clients(6, [0.01, 0.01, 0.02, 0.08, 0.08, 0.08]))
        ours = first_choice("coarse", options, Limits(), seed=0)
        lot = [first_choice("random-hybrid", options, Limits(), seed=seed) for seed in range(5)]
        assert {found.sum() for found in lot} == {ours.sum()}
        assert len({tuple(found) for found in lot}) > 1


class TestAggregate:
    def test_the_mean_is_weighted_and_whole_numbers_stay_whole(self):
        updates = [{"w": torch.tensor([0.0]), "n": torch.tensor(2)}, {"w": torch.tensor([3.0]), "n": torch.tensor(2)}]
        found = combine(updates, [2.0, 1.0])
        assert found["w"].item() == pytest.approx(1.0)
        assert found["n"].dtype == torch.int64
        assert found["n"] == 2

    def test_trimming_resists_a_fifth_of_garbage(self):
        good = [{"w": torch.randn(50, generator=torch.manual_seed(seed)) * 0.1 + 1} for seed in range(8)]
        bad = [{"w": torch.full((50,), 1e6)}, {"w": torch.full((50,), -1e7)}]
        assert (combine(good + bad, [1.0] * 10, trim=0.2)["w"] - 1).abs().max() < 0.3
        assert combine(good + bad, [1.0] * 10)["w"].abs().max() > 1e5

    def test_trimming_all(self):
        with pytest.raises(MoqaError, match=r"trim=0.4 leaves none of 2 updates"):
            combine([{"w": torch.ones(1)}] * 2, [1, 1], trim=0.4)


class TestRoofline:
    def test_work_is_counted_operation_by_operation(self):
        weight = torch.ones(32, 64, requires_grad=True)
        work = work_of(lambda: torch.ones(8, 64) @ weight.T, samples=8)
        assert sum(work.flops) == 2 * 32 * 64
        assert max(work.bytes) * 8 == 4 * (8 * 64 + 64 * 32 + 8 * 32)

    def test_training_with_rounding_takes_longer_and_the_slowest_machine_most(self):
        works = {}
        for kind, bits in (("fp", 32), ("qat", 3)):
            model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
            batch = (torch.randn(8, 64), torch.arange(8) % 4)
            with in_mode(model, LocalMode(kind, bits)):
                works[kind] = work_of(lambda model=model, batch=batch: batch_loss(model, batch).backward(), 8)
        machine = Machine(flops=1e9, bandwidth=1e9, link=1e6)
        clock = SimulatedClock([machine, machine.slower(8)], works)
        assert clock.per_sample(0, "qat") > clock.per_sample(0, "fp")
        assert clock.per_sample(1, "fp") == pytest.approx(8 * clock.per_sample(0, "fp"))
        assert clock.seconds(0, "fp", 0, bytes_=2_000_000) == 2.0


class TestSimulatedWork:
    def experiment(self, **fields) -> Experiment:
        folder = Path(__file__).resolve().parents[1] / "reference" / "text"
        return Experiment(data="text", folder=folder, samples=320, test_samples=4, batch=4, **fields)

    def test_a_measured_cost_of_rounding_and_epochs_are_counted(self):
        counted, told = clock_of(self.experiment()), clock_of(self.experiment(qat_cost=3.0, epochs=2))
        assert 1 < counted.per_sample(0, "qat") / counted.per_sample(0, "fp") < 3
        assert told.per_sample(0, "qat") == pytest.approx(6 * counted.per_sample(0, "fp"))
        assert told.per_sample(0, "ptq") == pytest.approx(2 * counted.per_sample(0, "fp"))

    def test_clients_have_the_optimizer_of_the_file(self):
        kinds = {
            name: type(optimizers_of(self.experiment(optimizer=name), nn.Linear(4, 4))[0]) for name in (None, "adamw")
        }
        assert kinds == {None: torch.optim.SGD, "adamw": torch.optim.AdamW}


class TestSplit:
    @pytest.mark.parametrize("alpha", [0.1, 0.5, float("inf")])
    def test_everyone_has_samples_and_small_alphas_are_skewed(self, alpha):
        labels = np.arange(2000) % 10
        found = dirichlet(labels, 10, alpha, np.random.default_rng(0))
        table = np.stack([np.bincount(labels[found == client], minlength=10) for client in range(10)])
        assert table.sum() == 2000
        assert table.sum(1).min() >= 8
        skew = skews(table).mean()
        assert {0.1: skew > 0.3, 0.5: 0.05 < skew < 0.4, float("inf"): skew < 0.01}[alpha]

    def test_too_few_samples(self):
        with pytest.raises(MoqaError, match="40 samples are too few for 10 clients"):
            dirichlet(np.zeros(40, int), 10, 0.5, np.random.default_rng(0))


class TestSettings:
    def write(self, folder: Path, text: str) -> Path:
        (folder / "one.toml").write_text(text)
        return folder / "one.toml"

    def test_reads_what_was_written(self, tmp_path):
        found = read_experiment(self.write(tmp_path, 'data = "cifar10"\nsplit = inf\nbits = 2\nkeep = ["8"]\n'))
        assert found == Experiment(data="cifar10", bits=2, keep=("8",))

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ('data = "cifar10"\nclient = 3', "client is unknown: known are data, folder, split, clients"),
            ('data = "imagenet"', "data: input should be 'fashion-mnist', 'cifar10' or 'text'"),
            ('data = "text"\nbits = 5', "bits: input should be 8, 4, 3 or 2"),
            ('data = "text"\nclients = 1', "clients: input should be greater than or equal to 2"),
            ('data = "text"\noptimizer = "adam"', "optimizer: .*adam is unknown: there are adamw, muon, sgd, soap"),
            ('data = "text"\nqat_cost = 0.5', "qat_cost: input should be greater than or equal to 1"),
            ("data = ", "is not TOML"),
            ("", "data: field required"),
        ],
    )
    def test_mistakes_are_one_line(self, tmp_path, text, said):
        with pytest.raises(MoqaError, match=said):
            read_experiment(self.write(tmp_path, text))


def test_a_client_starts_without_transformers():
    """Flower starts a process for every message, and that import takes longer than all others together."""
    code = "import sys; from moqa.federated import local, measured, mod; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
