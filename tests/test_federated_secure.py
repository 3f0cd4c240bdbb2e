"""Secure aggregation: masks cancel, sums are the sums, and servers that ask for more are refused."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_federated_runs import CLIENTS, app_with, clock, network, right, trained

from moqa.errors import MoqaError
from moqa.federated import FedHQ, mod
from moqa.federated.common_grid import CommonGrid, masked_update
from moqa.federated.flower import ArrayRecord, ClientApp
from moqa.federated.local_grid import LocalGrid
from moqa.federated.masks import Secrets, unmasked
from moqa.federated.order import ARRAYS, ORDER, SECURE, payload
from moqa.federated.secure_client import step_of
from moqa.federated.updates import UpdateError

LIKE = {"w": torch.zeros(40, 64), "b": torch.zeros(40), "n": torch.zeros((), dtype=torch.int64)}


def grid(bits=3, clients=5, steps=None, share=1.0) -> CommonGrid:
    return CommonGrid(LIKE, bits, clients, {} if steps is None else steps, share)


def update(seed: int, scale: float = 0.01) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: scale * torch.randn(LIKE[name].shape, generator=generator) for name in ("w", "b")}
    return found | {"n": torch.tensor(7)}


class TestCommonGrid:
    @pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
    @pytest.mark.parametrize("clients", [3, 10, 100])
    def test_the_sum_of_numbers_is_the_sum_of_what_they_say(self, bits, clients):
        one = grid(bits, clients)
        first = sum(one.integers(update(seed)) for seed in range(clients))
        two = grid(bits, clients, one.next_steps(first, clients))
        total = sum(two.integers(update(seed)) for seed in range(clients))
        wanted = torch.stack([two.sent(two.integers(update(seed)))["w"] for seed in range(clients)]).mean(0)
        found = two.mean(total, clients, clients)
        assert torch.allclose(found["w"], wanted, atol=1e-6)
        assert found["n"] == 7
        error = (two.sent(two.integers(update(0)))["w"] - update(0)["w"]).square().mean() / 0.01**2
        assert error < {2: 0.3, 3: 0.06, 4: 0.02, 8: 1e-3, 16: 1e-6}[bits]  # Max's table: .190, .044, .0115

    @settings(max_examples=25)
    @given(bits=st.sampled_from([2, 3, 4, 8]), clients=st.integers(3, 200), seed=st.integers(0, 9))
    def test_any_number_of_bits_survives_the_wire(self, bits, clients, seed):
        one = grid(bits, clients, {"w": 0.01, "b": 0.01, "n": 1.0})
        numbers = one.integers(update(seed))
        data = one.pack(numbers)
        assert len(data) == one.length
        assert one.unpack(data)["masked"].tolist() == numbers.tolist()

    def test_bytes_are_the_bits_of_a_sum(self):
        one = grid(2, 10, {"w": 0.01, "b": 0.01, "n": 1.0})
        assert one.widths == (5, 20)
        assert one.length == 2560 * 5 // 8 + -(-(40 + 1 + 3) * 20 // 8)

    def test_what_is_not_sent_is_left_for_the_next_update(self):
        total, left, steps = torch.zeros(40, 64), {}, {"w": 0.01, "b": 0.001, "n": 1.0}
        zero = {name: torch.zeros_like(tensor) for name, tensor in LIKE.items()}
        for _ in range(20):
            one = grid(2, 3, steps, share=2.0)
            numbers, left = masked_update(one, zero, update(0), left)
            total += one.mean(numbers, 1, 2.0)["w"] / 20
            steps = one.next_steps(numbers, 1)
        once = one.sent(one.integers(update(0)))["w"]
        assert (total - update(0)["w"]).norm() < 0.3 * (once - update(0)["w"]).norm()

    def test_another_length_is_refused(self):
        with pytest.raises(UpdateError, match="1 bytes instead of"):
            grid().unpack(b"x")


class TestMasks:
    @pytest.mark.parametrize("gone", [(), (0,), (1, 3)])
    def test_cancel_whoever_leaves(self, gone):
        nodes, vector = range(5), np.arange(6, dtype=np.uint32)
        secrets = {node: Secrets.fresh() for node in nodes}
        publics = {node: one.public for node, one in secrets.items()}
        sealed = {node: one.shares(node, publics, 3) for node, one in secrets.items()}
        here = [node for node in nodes if node not in gone]
        total = sum(secrets[node].masked(node, vector * node, publics) for node in here)

        def opened(source, kind):
            return [secrets[n].opened(n, source, publics[source], sealed[source][n])[kind] for n in here[-3:]]

        found = unmasked(total, [opened(node, 0) for node in here], {node: opened(node, 1) for node in gone}, publics)
        assert found.tolist() == (vector * sum(here)).tolist()

    def test_a_masked_vector_tells_nothing(self):
        secrets = {node: Secrets.fresh() for node in range(3)}
        publics = {node: one.public for node, one in secrets.items()}
        masked = secrets[0].masked(0, np.zeros(4096, np.uint32), publics)
        # bits of random numbers: each set in about half, 4 standard deviations
        set_ = ((masked[:, None] >> np.arange(32)) & 1).mean(0)
        assert np.abs(set_ - 0.5).max() < 4 * 0.5 / 64

    def test_a_share_for_another_client_is_refused(self):
        secrets = {node: Secrets.fresh() for node in range(3)}
        publics = {node: one.public for node, one in secrets.items()}
        sealed = secrets[0].shares(0, publics, 2)
        with pytest.raises(MoqaError, match="not sealed by it"):
            secrets[2].opened(2, 0, publics[0], sealed[1])
        with pytest.raises(MoqaError, match="not sealed by it"):
            secrets[1].opened(1, 0, publics[0], sealed[1][:-4] + b"AAAA")


def at(step, client, do):
    """A mod of a client that does something before a step is answered."""

    def change(message, context, call_next):
        if step_of(message) == step and context.node_config["partition-id"] == client:
            do(message)
        return call_next(message, context)

    return change


def fails(message):
    raise RuntimeError("killed")


def app(*mods) -> ClientApp:
    return app_with(mods=[*mods, mod])


def secured(app, **options):
    return trained(app, secure=True, min_available_nodes=3, **options)


class TestStrategy:
    def test_learns_as_without_masks(self):
        strategy, result = secured(app(), rounds=5, allocation="qat")
        plain, without = trained(app(), rounds=5, allocation="qat")
        assert right(result.arrays) > right(without.arrays) - 0.05
        assert not any(one.refused for one in strategy.rounds)
        sent = [one.uplink_bytes for one in strategy.rounds[1:]]
        assert sent[0] > sent[1]  # the first sum is on the fine grid
        assert sent[-1] > plain.rounds[-1].uplink_bytes  # sums of clients have more bits than a client

    def test_the_server_sees_no_update_but_their_sum(self):
        seen, said = [], []

        def watch(message, context, call_next):
            reply = call_next(message, context)
            if step_of(message) == "train":
                seen.append(payload(reply.content, 10**9))
            if SECURE in reply.content:
                said.append(set(reply.content[SECURE]))
            return reply

        strategy, _ = secured(app(watch), rounds=2, allocation="qat")
        last = np.frombuffer(b"".join(seen[-CLIENTS:]), np.uint8)
        counts = np.bincount(last, minlength=256) / len(last)
        assert counts.max() < 2.0 / 256  # without masks most numbers are near the middle of the grid
        assert {frozenset(one) for one in said} == {
            frozenset({"public"}), frozenset({"nodes", "sealed"}), frozenset({"seeds", "masks"})
        }  # fmt: skip
        assert strategy.sums.steps["0.weight"] > 0

    @pytest.mark.parametrize("step", ["keys", "shares", "train", "reveal"])
    def test_a_client_that_leaves_at_any_step(self, step):
        strategy, result = secured(app(at(step, 2, fails)), rounds=3)
        refused = [line for one in strategy.rounds for line in one.refused]
        if step == "reveal":  # its update is there, and four others unmask the sum
            assert not refused
        else:
            assert len(refused) == 3
            assert all("client 2 refused: failed (RuntimeError: killed)" in line for line in refused)
        assert right(result.arrays) > 0.5

    def test_too_few_leave_the_model_as_it_was(self):
        mods = [at("train", client, fails) for client in (1, 2)]
        strategy, result = secured(app(*mods), rounds=1)
        assert (
            strategy.rounds[1]
            .refused[-1]
            .startswith("round 1: the model stays as it was: 3 clients have sent an update, and 4 are needed")
        )
        for name, tensor in result.arrays.to_torch_state_dict().items():
            assert torch.equal(tensor, network().state_dict()[name])

    def test_too_few_that_agree(self):
        mods = [at("keys", client, fails) for client in (1, 2)]
        strategy, _ = secured(app(*mods), rounds=1)
        assert "round 1: nobody trains: 3 clients have sent keys, and 4 are needed" in strategy.rounds[1].refused[0]
        assert strategy.rounds[1].modes == {}

    def test_goes_on_from_its_state(self):
        options = {"secure": True, "allocation": "qat", "seed": 1, "clock": clock(), "link": 1e6}
        grid_, first = LocalGrid(app(), CLIENTS), FedHQ(3, fraction_evaluate=0.0, min_available_nodes=3, **options)
        half = first.start(grid_, ArrayRecord(network().state_dict()), num_rounds=2)
        again, second = LocalGrid(app(), CLIENTS), FedHQ(3, fraction_evaluate=0.0, min_available_nodes=3, **options)
        again.restore(grid_.residuals())
        second.restore(json.loads(json.dumps(first.state())))
        rest = second.start(again, half.arrays, num_rounds=4)
        _, whole = secured(app(), rounds=4, allocation="qat")
        for name, tensor in whole.arrays.to_torch_state_dict().items():
            # masks are other ones, sums the same
            assert torch.equal(tensor, rest.arrays.to_torch_state_dict()[name])

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"trim": 0.2}, "trimming looks at single updates"), ({"upload_bits": [2, 4]}, "a sum has one"),
            ({"min_available_nodes": 2}, "of 2, each knows the other"),
        ],
    )  # fmt: skip
    def test_what_masks_hide_cannot_be_asked_for(self, options, said):
        with pytest.raises(MoqaError, match=said):
            FedHQ(**{"secure": True, "min_available_nodes": 3, **options})


def ask(**changes):
    return lambda message: message.content[SECURE].update(changes)


class TestServersThatAskForMore:
    @pytest.mark.parametrize(
        ("step", "change", "said"),
        [
            ("shares", ask(threshold=1), "a threshold of 1 of 5 clients does not protect"),
            ("shares", lambda m: m.content[SECURE].update(public=[b"k"] * 10), "not those that they have sent"),
            ("train", ask(nodes=[2], sealed=[b""]), "1 clients are too few to hide among"),
            ("reveal", ask(gone=[2]), "asks for both secrets of a client"),
            ("reveal", ask(here=[0, 1]), "a sum of 2 updates tells too much"),
            ("reveal", ask(here=[0, 1, 2, 3, 9]), "one that is not in the round"),
            ("reveal", ask(round=7), "round 7 has no secrets of this client"),
        ],
    )
    def test_are_refused_by_the_client(self, step, change, said):
        replies = []

        def watch(message, context, call_next):
            reply = call_next(message, context)
            if step_of(message) == step and context.node_config["partition-id"] == 2:
                replies.append(reply.content.config_records[ORDER].get("error", ""))
            return reply

        secured(app(watch, at(step, 2, change)), rounds=1)
        assert said in replies[0]

    def test_secrets_are_given_once(self):
        again = []

        def twice(message, context, call_next):
            reply = call_next(message, context)
            if step_of(message) == "reveal":
                again.append(call_next(message, context).content.config_records[ORDER]["error"])
            return reply

        strategy, _ = secured(app(twice), rounds=1)
        assert len(again) == CLIENTS
        assert all("has no secrets of this client" in line for line in again)
        assert not strategy.rounds[1].refused

    def test_updates_have_no_plain_arrays(self):
        def watch(message, context, call_next):
            reply = call_next(message, context)
            if step_of(message) == "train":
                assert list(reply.content[ARRAYS]) == ["moqa"]
            return reply

        strategy, _ = secured(app(watch), rounds=1)
        assert not strategy.rounds[1].refused


@pytest.mark.parametrize("secure", [False, True])
def test_flowers_local_differential_privacy_works_on_what_is_packed_afterwards(secure):
    from flwr.clientapp.mod import LocalDpMod

    dp = LocalDpMod(clipping_norm=0.05, sensitivity=0.05, epsilon=1e6, delta=1e-5)

    def on_training(message, context, call_next):  # as `@app.train(mods=[dp])` does
        return (
            dp(message, context, call_next) if message.metadata.message_type == "train" else call_next(message, context)
        )

    strategy, result = (
        secured(app_with(mods=[mod, on_training]), rounds=1, allocation="fp")
        if secure
        else trained(app_with(mods=[mod, on_training]), rounds=1, allocation="fp")
    )
    assert not strategy.rounds[1].refused
    before, after = network().state_dict(), result.arrays.to_torch_state_dict()
    moved = sum((after[name] - before[name]).square().sum() for name in before).sqrt()
    assert 0.01 < moved < 0.06


def test_pairs_have_one_key_each():
    secrets = [Secrets.fresh() for _ in range(4)]
    assert len({key for one in secrets for key in one.public}) == 8
    assert all(a.seed != b.seed for a, b in combinations(secrets, 2))
