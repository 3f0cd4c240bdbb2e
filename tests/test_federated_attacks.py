"""Federated clients that send what they should not, or lie about their speed."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_federated import clients
from test_federated_runs import CLIENTS, app_with, clock, network, right, trained

from moqa.federated import FedHQ, mod
from moqa.federated.flower import ArrayRecord, Error, Message, MetricRecord
from moqa.federated.guard import Timing, liars
from moqa.federated.local_grid import LocalGrid
from moqa.federated.order import ARRAYS, EMPTY, FACTS, ORDER, arrays_of, payload
from moqa.federated.replies import gather


def at_once(node: int, most: float) -> float:
    """Of a node that answers a message that asks for nothing in no time."""
    return 0.0


def judged(those, taken, claimed, reported=None, empty=at_once, rounds=1) -> list[str]:
    """Lines of several equal rounds; seconds by position."""
    found = []
    for _ in range(rounds):
        said = [None] * len(those) if reported is None else reported
        timings = {
            client.node: Timing(*each) for client, *each in zip(those, taken, claimed, said, strict=True)
        }  # fmt: skip
        found += liars(those, timings, empty)
    return found


class TestLiars:
    def test_a_client_that_says_it_is_fast_is_left_out_after_two_rounds(self):
        those = clients(4)
        taken, claimed = [1.1, 1.1, 1.1, 8.0], [1.0] * 4
        assert judged(those, taken, claimed) == []
        lines = judged(those, taken, claimed)
        assert lines == ["client 3 excluded: it said 1 s, and took 8 s; an empty message takes 0 s, 2 rounds in a row"]
        assert [bool(client.excluded) for client in those] == [False, False, False, True]
        assert judged(those, taken, claimed) == []

    def test_one_that_says_after_every_round_what_it_took_is_slow_but_honest(self):
        those = clients(4)
        assert judged(those, [1.1, 1.1, 1.1, 8.0], [1.0] * 4, reported=[1.0, 1.0, 1.0, 7.9], rounds=5) == []

    @pytest.mark.parametrize("reported", [None, [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 25.0, 1.0]])
    def test_a_client_that_says_it_is_slow(self, reported):
        those = clients(4)
        lines = judged(those, [1.1] * 4, [1.0, 1.0, 20.0, 1.0], reported=reported, rounds=2)
        assert lines[0].startswith("client 2 excluded: it said 2")

    def test_one_that_says_it_has_trained_for_longer_than_the_round_took(self):
        those = clients(4)
        lines = judged(those, [10.0] * 4, [1.0] * 4, reported=[1.0, 1.0, 1.0, 15.0], rounds=2)
        assert lines == ["client 3 excluded: it said 15 s, and took 10 s, 2 rounds in a row"]

    def test_one_bad_round_is_forgiven(self):
        those = clients(4)
        for taken in (8.0, 1.1, 8.0, 1.1):
            assert judged(those, [1.1, 1.1, 1.1, taken], [1.0] * 4) == []

    def test_a_machine_that_answers_slowly_from_the_start_is_no_liar(self):
        those = clients(4)
        those[3].latency = 60.0  # it starts Flower's process slowly, as it had for its first answer
        assert judged(those, [10.0, 10.0, 10.0, 55.0], [0.1] * 4, rounds=5) == []
        # a quick one is not taken for slow by it
        assert judged(those, [0.1] * 4, [0.1] * 4, rounds=2) == []

    def test_one_whose_process_starts_slower_than_at_first_is_asked_once(self):
        those, asked = clients(4), []

        def empty(node, most):
            asked.append((node, most))
            return min(12.0, most)

        taken = [9.0, 9.0, 9.0, 21.0]
        for client in those:
            client.latency = 9.0
        assert judged(those, taken, [0.02] * 4, reported=[0.02] * 4, empty=empty, rounds=5) == []
        assert [node for node, _ in asked] == [103]
        assert asked[0][1] < 21.0 / 3  # nobody is waited for longer
        assert those[3].latency == pytest.approx(21.0 - 0.02)

    def test_messages_that_take_long_with_everyone_are_nobodys_lie(self):
        assert judged(clients(4), [9.0] * 4, [0.1] * 4, rounds=5) == []

    @given(
        start=st.floats(0.1, 30.0), work=st.floats(0.01, 100.0), epochs=st.integers(1, 10),
        spread=st.lists(st.floats(1.0, 3.0), min_size=24, max_size=24), probe=st.floats(0.4, 2.9),
    )  # fmt: skip
    def test_an_honest_client_is_never_left_out(self, start, work, epochs, spread, probe):
        """Starts differ by a factor of three, the probe was wrong by nearly that, and the app has several epochs."""
        those, rest = clients(4), iter(spread)
        for client in those:
            client.latency = start * next(rest)
        for _ in range(4):
            taken = [1.0, 1.0, 1.0, start * next(rest) + work * epochs]
            claimed, reported = [0.5, 0.5, 0.5, work * probe], [0.5, 0.5, 0.5, work * epochs]
            empty = start * next(rest)
            assert judged(those, taken, claimed, reported, lambda node, most, own=empty: min(own, most)) == []

    @given(
        said=st.floats(0.01, 5.0), start=st.floats(0.0, 5.0), factor=st.floats(4.1, 1000.0),
        waits=st.booleans(), tells=st.booleans(),
    )  # fmt: skip
    def test_a_liar_is_left_out_or_its_time_is_known(self, said, start, factor, waits, tells):
        """One that lets messages that ask for nothing wait, too, is a client with a slow start, and is planned with."""
        those, work = clients(4), factor * (said + start)
        for client in those:
            client.latency = start
        taken = [start + 0.1, start + 0.1, start + 0.1, start + work]
        reported = [0.1, 0.1, 0.1, said if tells else None]
        claimed = [0.1, 0.1, 0.1, said]
        judged(those, taken, claimed, reported, lambda node, most: most if waits else min(start, most), rounds=2)
        if waits:
            assert those[3].latency + said == pytest.approx(start + work)
        else:
            assert those[3].excluded
        assert not any(client.excluded for client in those[:3])


def resent(reply, first={}):  # noqa: B006
    return first.setdefault("data", payload(reply.content, 10**9))


ATTACKS = {
    "nan": (lambda reply, _: put(reply, spoil(reply, float("nan"))), "numbers that are not finite"),
    "oversized": (lambda reply, _: put(reply, bytes(10**6)), "oversized"),
    "malformed": (lambda reply, _: put(reply, bytes(len(payload(reply.content, 10**9)))), "not safetensors"),
    "short": (lambda reply, _: put(reply, b"x"), "1 bytes instead of"),
    "pickled": (lambda reply, _: pickled(reply), "not an array|an array of"),
    "no update": (lambda reply, _: reply.content.pop(ARRAYS), "no packed update"),
    "another order": (lambda reply, _: reply.content[ORDER].update({"nonce": "0"}), "replayed: it answers another"),
    "same bytes": (lambda reply, _: put(reply, resent(reply)), "replayed: the same bytes"),
}  # fmt: skip


def put(reply, data: bytes) -> None:
    reply.content[ARRAYS] = arrays_of(data)


def spoil(reply, value: float) -> bytes:
    from safetensors.torch import load, save

    stored = load(payload(reply.content, 10**9))
    return save({name: t * value if t.is_floating_point() else t for name, t in stored.items()})


def pickled(reply) -> None:
    array = next(iter(reply.content[ARRAYS].values()))
    array.data = b"\x80\x04K\x01."


class TestAttacks:
    @pytest.mark.parametrize("kind", ATTACKS)
    def test_are_refused_and_named_and_the_round_goes_on(self, kind):
        change, said = ATTACKS[kind]

        def attack(reply, client, round_):
            if client == 3:
                change(reply, round_)

        strategy, result = trained(app_with(attack), rounds=3, allocation="ptq")
        refused = [line for one in strategy.rounds for line in one.refused]
        # the first of equal bytes is an honest update
        assert len(refused) == (2 if kind == "same bytes" else 3)
        assert all(re.search(f"client 3 refused: .*({said})", line) for line in refused)
        assert right(result.arrays) > 0.6

    def test_a_client_that_fails_loses_only_its_update(self):
        def attack(reply, client, round_):
            if client == 2 and round_ == 2:
                raise RuntimeError("killed")

        strategy, _ = trained(app_with(attack), rounds=3)
        assert strategy.rounds[2].refused == ["round 2: client 2 refused: failed (RuntimeError: killed)"]
        assert not strategy.rounds[3].refused

    def test_a_client_that_does_not_answer_is_not_waited_for(self):
        class Silent(LocalGrid):
            def pull_messages(self, message_ids):
                replies = super().pull_messages(message_ids)
                return [r for r in replies if r.metadata.src_node_id != 2 or r.metadata.message_type != "train"]

        strategy = FedHQ(3, seed=1, clock=clock(), link=1e6, fraction_evaluate=0.0)
        strategy.start(
            Silent(app_with(), CLIENTS), ArrayRecord(network().state_dict()), num_rounds=1, timeout=0.5
        )  # fmt: skip
        assert strategy.rounds[1].refused == ["round 1: client 2 has sent nothing in 0.5 s"]
        assert sorted(strategy.rounds[1].modes) == [0, 1, 2, 3, 4]

    def test_a_node_that_is_gone_is_named_though_the_superlink_says_so_in_its_own_name(self):
        class Gone(LocalGrid):
            def pull_messages(self, message_ids):
                replies = super().pull_messages(message_ids)
                for at, reply in enumerate(replies):
                    if reply.metadata.src_node_id == 2 and reply.metadata.message_type == "train":
                        replies[at] = Message(Error(5, "node is gone"), reply_to=reply)
                        replies[at].metadata.__dict__["_src_node_id"] = 1  # the SuperLink's
                        replies[at].metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
                return replies

        strategy = FedHQ(3, seed=1, clock=clock(), link=1e6, fraction_evaluate=0.0)
        strategy.start(Gone(app_with(), CLIENTS), ArrayRecord(network().state_dict()), num_rounds=1)
        assert strategy.rounds[1].refused == ["round 1: client 2 refused: failed (node is gone)"]

    def test_a_client_that_fails_when_it_is_asked_is_asked_again(self):
        asked = []

        def fails_once(facts, client):
            if client == 2:
                asked.append(client)
                if len(asked) == 1:
                    raise RuntimeError("killed")

        strategy, _ = trained(app_with(said=fails_once), rounds=1)
        assert strategy.rounds[0].refused == ["client at node 2: failed (RuntimeError: killed)"]
        assert sorted(strategy.rounds[1].modes) == [0, 1, 2, 3, 4]

    def test_scaled_garbage(self):
        def attack(reply, client, round_):
            if client == 1:
                put(reply, spoil(reply, 1000.0 * (-1) ** round_))

        open_, resisting = (
            trained(app_with(attack), allocation="qat", trim=trim, clock=clock())[1] for trim in (0.0, 0.2)
        )
        assert right(resisting.arrays) > 0.6
        assert right(open_.arrays) < right(resisting.arrays) - 0.2

    def test_too_few_updates_to_trim_leave_the_model(self):
        def attack(reply, client, round_):
            if round_ == 2 and client > 1:
                put(reply, b"x")

        strategy, _ = trained(app_with(attack), rounds=3, trim=0.4, clock=clock())
        assert (
            strategy.rounds[2].refused[-1].startswith("round 2: the model stays as it was: trim=0.4 leaves none of 2")
        )
        assert not strategy.rounds[3].refused

    def test_a_client_that_lies_about_its_speed_is_left_out(self):
        def lies(facts, client):
            for kind in ("fp", "ptq", "qat"):
                facts[f"seconds.{kind}"] /= 20 if client == 4 else 1

        app = app_with(said=lies)
        strategy, _ = trained(app, rounds=4, clock=clock(), link=1e6, allocation="coarse")
        assert any("client 4 excluded: it said" in line for line in strategy.rounds[2].changes)
        assert 4 in strategy.rounds[2].modes
        assert 4 not in strategy.rounds[3].modes
        assert strategy.rounds[3].seconds < strategy.rounds[2].seconds

    @pytest.mark.parametrize(("empty", "excluded"), [(12.0, False), (1.0, True)])
    def test_with_real_seconds_a_slow_start_is_told_from_slow_training(self, monkeypatch, empty, excluded):
        """Client 4 takes 20 s for training that it says takes none; what tells is how it answers an empty message."""

        def gathered(grid, messages, timeout):
            replies, _ = gather(grid, messages, timeout)
            assert not any(reply.has_error() for reply in replies)
            seconds = {"train": 20.0, "empty": empty, "query": 9.0}
            kinds = {
                m.metadata.dst_node_id: "empty" if EMPTY in m.content else m.metadata.message_type for m in messages
            }
            return replies, {
                node: seconds[kind.partition(".")[0]] if node == 4 else 1.0 for node, kind in kinds.items()
            }  # fmt: skip

        monkeypatch.setattr("moqa.federated.strategy.gather", gathered)
        strategy, _ = trained(app_with(), rounds=4, clock=None, link=None, allocation="ptq")
        assert (4 in strategy.rounds[3].modes) is not excluded
        lines = [line for one in strategy.rounds for line in one.changes]
        assert bool(lines) is excluded
        if excluded:
            assert re.search("client 4 excluded: it said .* and took 20 s; an empty message takes 1 s", lines[0])

    def test_one_that_has_said_too_long_a_time_by_mistake_is_asked_again_and_stays(self):
        asked = []

        def says(facts, client):
            asked.append(client)
            if client == 2 and asked.count(2) == 1:
                for kind in ("fp", "ptq", "qat"):
                    facts[f"seconds.{kind}"] *= 20

        strategy, _ = trained(app_with(said=says), rounds=4, allocation="coarse")
        assert asked.count(2) == 2
        assert not strategy.clients[2].excluded
        assert [len(one.modes) for one in strategy.rounds[1:]] == [CLIENTS] * 4

    @pytest.mark.parametrize(
        "metrics",
        [{"num-examples": 0}, {"num-examples": -192}, {"num-examples": [1, 2]}, {"num-examples": 192, "x": 1}],
    )
    def test_metrics_that_do_not_add_up_do_not_stop_the_round(self, metrics):
        def attack(reply, client, round_):
            if client == 0:
                reply.content["metrics"] = MetricRecord(metrics)
                reply.content[FACTS] = MetricRecord({"loss": [1.0, 2.0], "loss-rounded": float("nan")})

        _, result = trained(app_with(attack), rounds=2, clock=clock())
        assert right(result.arrays) > 0.4

    def test_a_client_that_says_it_has_all_samples_of_the_world(self):
        app = app_with(said=lambda facts, client: facts.update({"samples": 10**15} if client == 0 else {}))
        strategy, _ = trained(app, rounds=1)
        assert "too many samples" in strategy.rounds[0].refused[0]

    def test_a_client_that_says_what_cannot_be(self):
        app = app_with(said=lambda facts, client: facts.update({"samples": -5} if client == 0 else {}))
        strategy, _ = trained(app, rounds=1)
        assert "says what cannot be" in strategy.rounds[0].refused[0]
        assert 0 not in strategy.rounds[1].modes

    def test_two_clients_that_say_they_have_the_same_data_are_told_apart(self):
        def same(message, context, call_next):
            reply = call_next(message, context)
            reply.content[ORDER]["partition"] = 7
            return reply

        strategy, _ = trained(app_with(mods=[same, mod]), rounds=1, clock=None)
        assert sorted(strategy.rounds[1].modes) == [0, 1, 2, 3, 7]
