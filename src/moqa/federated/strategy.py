"""`moqa.federated.FedHQ`: a Flower strategy that decides which clients round after training, and which during it."""

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import numpy as np

from moqa.errors import MoqaError, one_line
from moqa.federated.aggregate import combine
from moqa.federated.allocation import choices_of, features_of, first_choice, options_of
from moqa.federated.coarse import Limits, ModeOptions
from moqa.federated.fine import FineAllocator
from moqa.federated.flower import (
    ArrayRecord,
    ConfigRecord,
    FedAvg,
    Grid,
    Message,
    MetricRecord,
    RecordDict,
    Result,
    message_bytes,
)
from moqa.federated.guard import Timing, UpdateGuard, described, gain_of, liars, seconds_of
from moqa.federated.kept import read_rounds, write_rounds
from moqa.federated.learned import Observation
from moqa.federated.modes import BITS, FULL, Allocation, LocalMode
from moqa.federated.order import ACTION, ARRAYS, EMPTY, FACTS, ORDER, Order, arrays_of, record_of, state_of
from moqa.federated.records import ClientRecord, RoundRecord
from moqa.federated.replies import gather
from moqa.federated.roofline import SimulatedClock
from moqa.federated.secure import SecureSums
from moqa.federated.updates import Packing, State, UpdateError

_TIMEOUT = 3600.0
_LOG = logging.getLogger("flwr")
Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]


class FedHQ(FedAvg):
    """Federated averaging with packed updates, in which every client has the mode that suits it.

    >>> strategy = FedHQ(bits=3)
    >>> result = strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=20)  # doctest: +SKIP
    >>> strategy.rounds[-1].changes  # doctest: +SKIP
    ['round 20: client 3 ptq -> qat: predicted to bring +12%, after 190 updates (0.81 -> 1.2 s)']

    Clients need `moqa.federated.mod`, `local` and `measured`. The model that is trained is meant to be stored in
    `bits`; the arrays of the result are its exact weights, see `moqa.federated.modes.rounded`.

    Args:
        bits: of weights, 8, 4, 3 or 2; inputs of layers have 8, or 4 with weights of 4 and less.
        allocation: `coarse+fine` decides before the first round and learns from every one, `coarse` decides once,
            `random-hybrid` by lot; with `ptq`, `qat` and `fp` all clients do the same.
        round_seconds: deadline of a round; None for the one with the most progress per second.
        round_bytes: of all messages of a round; None for no limit.
        upload_bits: of updates, or several to choose from where `round_bytes` is tight; None for `bits`.
        download_bits: of the model on its way to the clients; `fp` has 32.
        keep: patterns of module names that are not rounded.
        trim: share of the clients that may be bad, see `moqa.federated.aggregate.combine`.
        epsilon: of local differential privacy of histograms of labels; None for exact counts.
        secure: the server sees the sum of the updates and none of them, see docs/federated.md.
        clock: of a simulation; None for the real one.
        link: bytes per second that clients are taken to have before the first round; None does not count messages.
        seed: of the lot and of sampling.
        min_available_nodes: that the first round waits for.
        options: of Flower's FedAvg, such as `fraction_train` and `fraction_evaluate`.

    Attributes:
        clients: by node.
        rounds: finished ones.

    Raises:
        MoqaError: if a value is not supported.

    After FedHQ (arXiv 2505.11982), of which only the abstract is public: every mechanism is our own, see
    docs/federated.md.
    """

    def __init__(
        self,
        bits: int = 4,
        *,
        allocation: Allocation = "coarse+fine",
        round_seconds: float | None = None,
        round_bytes: int | None = None,
        upload_bits: Sequence[int] | None = None,
        download_bits: int = 8,
        keep: Sequence[str] = (),
        trim: float = 0.0,
        epsilon: float | None = None,
        secure: bool = False,
        clock: SimulatedClock | None = None,
        link: float | None = None,
        seed: int = 0,
        min_available_nodes: int = 2,
        **options: Any,
    ) -> None:
        if allocation not in get_args(Allocation):
            raise MoqaError(f"allocation {allocation} is unknown", f"known are {', '.join(get_args(Allocation))}")
        for name, values in (
            ("bits", (bits,)),
            ("upload_bits", upload_bits or ()),
            ("download_bits", (download_bits,)),
        ):
            if set(values) - {*BITS, *(() if name == "bits" else (FULL,))}:
                raise MoqaError(f"{name}={values} is not supported", f"give {', '.join(map(str, BITS))}")
        if not 0 <= trim < 0.5:
            raise MoqaError(f"trim={trim} is not a share of bad clients", "give 0 or more, and less than 0.5")
        super().__init__(min_available_nodes=min_available_nodes, **{"min_train_nodes": 1} | options)
        self.bits, self.allocation, self.keep, self.trim, self.seed = bits, allocation, tuple(keep), trim, seed
        self.limits, self.epsilon = Limits(round_seconds, round_bytes), epsilon
        self.clock, self.link = clock, link
        self.download_bits = FULL if allocation == "fp" else download_bits
        self.choices = choices_of(allocation, tuple(upload_bits or (bits,)))
        uploads = [choice.upload for choice in self.choices]
        self.sums = SecureSums(uploads, trim, min_available_nodes) if secure else None
        if allocation == "coarse+fine":
            import_module("sklearn.gaussian_process")  # it takes a second, for which no round is to wait
        self.fine = FineAllocator(tuple(map(str, self.choices)))
        self.clients, self.rounds = dict[int, ClientRecord](), list[RoundRecord]()
        self.guard, self._chosen, self._sent = UpdateGuard(), dict[int, int](), dict[int, int]()
        self._arrived, self._timings, self._now = dict[int, float](), dict[int, Timing](), RoundRecord(round=0)
        self._before, self._unfit, self._timeout = State(), set[int](), _TIMEOUT
        self._expected = dict[int, list[float]]()
        self._rounds: int | None = None

    def start(  # type: ignore[override]  # Flower's own takes all by position
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        *,
        timeout: float = _TIMEOUT,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Evaluate | None = None,
        on_round: Callable[[RoundRecord, ArrayRecord], bool] | None = None,
        kept: Path | None = None,
    ) -> Result:
        """Train for some rounds, from the first one that is not finished.

        Args:
            grid: Flower's way to the clients.
            initial_arrays: the model's state dict.
            num_rounds: in all; `coarse+fine` plans with it.
            timeout: seconds after which a round does not wait for updates any more.
            train_config: sent to clients that train.
            evaluate_config: sent to clients that evaluate.
            evaluate_fn: of round and arrays, on the server; called before the first round, too.
            on_round: called after every round with its record and the arrays; training stops when it returns True.
            kept: file of finished rounds. If it exists, training goes on from there, with clients that may have left
                and come back.

        Raises:
            MoqaError: if no client can take part, saying why.
        """
        arrays, result, self._timeout, self._rounds = initial_arrays, Result(), timeout, num_rounds
        if kept is not None and kept.is_file():
            state, tensors = read_rounds(kept)
            self.restore(state)
            arrays = record_of(tensors)
        result.arrays = arrays
        first = self.rounds[-1].round + 1 if self.rounds else 0
        for number in range(first, num_rounds + 1):
            began = time.perf_counter()
            self._now = RoundRecord(round=number)
            if number == 0:
                nodes = self._nodes(grid, timeout)
                self._measure(arrays, grid, nodes, nodes, timeout)
            else:
                config = ConfigRecord() if train_config is None else train_config
                messages = self._agreed(list(self.configure_train(number, arrays, config, grid)), grid, timeout)
                replies, self._arrived = gather(grid, messages, timeout)
                for node in {message.metadata.dst_node_id for message in messages} - self._arrived.keys():
                    who = f"round {number}: client {self.clients[node].number}"
                    self._now.refused.append(f"{who} has sent nothing in {timeout:g} s")
                found, metrics = self.aggregate_train(number, replies)
                self._now.changes += liars(self.clients.values(), self._timings, partial(self._empty, grid))
                if self.sums is not None:
                    self._now.uplink_bytes += self.sums.round.up.total()
                    self._now.downlink_bytes += self.sums.round.down.total()
                arrays = arrays if found is None else found
                if metrics is not None:
                    result.train_metrics_clientapp[number] = metrics
                self._evaluate_on_clients(number, arrays, evaluate_config, grid, timeout, result)
            self._now.real_seconds = time.perf_counter() - began
            if evaluate_fn is not None:
                evaluated = evaluate_fn(number, arrays)
                if evaluated is not None:
                    result.evaluate_metrics_serverapp[number] = evaluated
                    self._now.metrics = {key: float(value) for key, value in evaluated.items()}  # type: ignore[arg-type]
            for line in (*self._now.refused, *self._now.changes):
                _LOG.info("%s", line)
            self.rounds.append(self._now)
            result.arrays = arrays
            if kept is not None:
                write_rounds(kept, self.state(), state_of(arrays))
            if on_round is not None and on_round(self._now, arrays):
                break
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to the clients of a round, each with its own order."""
        if self._now.round != server_round:
            self._now = RoundRecord(round=server_round)
        nodes = self._nodes(grid, _TIMEOUT)
        unknown = [node for node in nodes if node not in self.clients.keys() | self._unfit]
        doubted = [node for node, client in self.clients.items() if client.strikes and not client.excluded]
        self._measure(arrays, grid, [*unknown, *(node for node in nodes if node in doubted)], nodes, self._timeout)
        able = [node for node in nodes if node in self.clients and not self.clients[node].excluded]
        if not able:
            raise MoqaError("no client can take part", "; ".join(self._now.refused) or "all were excluded")
        began = time.perf_counter()
        self._allocate(server_round, able, arrays)
        self._now.allocator_seconds += time.perf_counter() - began
        count = max(round(len(able) * self.fraction_train), min(self.min_train_nodes, len(able)))
        generator = np.random.default_rng((self.seed, server_round, 1))
        # by position: numbers of nodes have 64 bits, which numpy takes for floats where it finds small and large ones
        chosen = sorted(able[at] for at in generator.choice(len(able), count, replace=False).tolist())
        config["server-round"] = server_round
        state = state_of(arrays)
        download = Packing(state, self.download_bits)
        packed = arrays_of(download.pack(state))
        self.guard.issued, messages = {}, []
        masked = self.sums.uploads(state, {node: self.clients[node].samples for node in chosen}) if self.sums else {}
        for node in chosen:
            choice = self.choices[self._chosen[node]]
            mode = LocalMode(choice.kind, FULL if choice.kind == "fp" else self.bits)
            upload = masked.get(node) or Packing(state, choice.upload)
            order = Order(server_round, secrets.token_hex(8), mode, download, upload, self.keep, None)
            self.guard.issued[node] = order
            content = RecordDict({ARRAYS: packed, self.configrecord_key: config, ORDER: order.record()})
            messages.append(Message(content=content, message_type="train", dst_node_id=node))
            self._now.modes[self.clients[node].number] = str(choice)
        self._before = state
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The new model from the updates that were accepted; the others are named in the record of the round."""
        updates, contents, observed = dict[int, State](), list[RecordDict](), list[Observation]()
        self._timings = {}
        began = time.perf_counter()
        features = (
            dict(zip(self.clients, features_of(list(self.clients.values())), strict=True)) if self.clients else {}
        )
        self._now.allocator_seconds += time.perf_counter() - began
        for reply in replies:
            node = reply.metadata.src_node_id
            size = message_bytes(reply)
            self._now.uplink_bytes += size
            client = self.clients.get(node)
            try:
                order, update = self.guard.accept(reply)
            except UpdateError as reason:
                number = node if client is None else client.number
                self._now.refused.append(f"round {server_round}: client {number} refused: {reason}")
                continue
            if client is None:
                continue
            updates[node] = update
            contents.append(reply.content)
            # Flower averages all other metrics
            facts = reply.content.pop(FACTS, None)
            gain = gain_of(facts)
            both = size + self._sent[node]
            seconds = self._seconds(client, order, both)
            if seconds is None:
                continue
            claimed = client.per_sample[order.mode.kind] * client.samples + both / (self.link or np.inf)
            # seconds that a simulated client has measured are not those of the simulated clock
            self._timings[node] = Timing(seconds, claimed, None if self.clock else seconds_of(facts))
            if gain is not None:
                slowness = seconds / max(claimed + client.latency, 1e-9)
                mode, own = self._chosen[node], tuple(features[node])
                observed.append(Observation(client.number, own, mode, gain, slowness, self._expected[node][mode]))
        self._now.seconds = max((timing.taken for timing in self._timings.values()), default=0.0)
        self.fine.observe(observed)
        if not updates:
            return None, None
        try:
            change = self._combined(updates)
        except MoqaError as error:
            self._now.refused.append(f"round {server_round}: the model stays as it was: {error}")
            return None, None
        after = {name: value + change[name].to(value.dtype) for name, value in self._before.items()}
        return record_of(after), self._averaged(server_round, contents)

    def _agreed(self, messages: list[Message], grid: Grid, timeout: float) -> list[Message]:
        """Orders as they are sent: with secure aggregation, to those that have agreed on masks."""
        number = self._now.round
        self._sent = {}
        if self.sums is not None:
            masks = self.sums.begin(grid, number, timeout)
            try:
                messages = self.sums.agree(messages)
            except UpdateError as reason:
                self._now.refused.append(f"round {number}: nobody trains: {reason}")
                messages = []
            for node, why in masks.dropped.items():
                self._now.refused.append(f"round {number}: client {self.clients[node].number} refused: {why}")
            self._sent = dict(masks.down + masks.up)
            there = {message.metadata.dst_node_id for message in messages}
            self._now.modes = {c.number: self._now.modes[c.number] for n, c in self.clients.items() if n in there}
        for message in messages:
            node, size = message.metadata.dst_node_id, message_bytes(message)
            self._now.downlink_bytes += size
            self._sent[node] = self._sent.get(node, 0) + size
        return messages

    def _combined(self, updates: dict[int, State]) -> State:
        """One update of all."""
        if self.sums is None:
            weights = [float(self.clients[node].samples) for node in updates]
            return combine(list(updates.values()), weights, self.trim)
        return self.sums.mean(updates)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to clients that evaluate the model, packed as for training."""
        state = state_of(arrays)
        download = Packing(state, self.download_bits)
        packed = arrays_of(download.pack(state))
        messages = list(super().configure_evaluate(server_round, arrays, config, grid))
        mode = LocalMode("fp", FULL) if self.allocation == "fp" else LocalMode("ptq", self.bits)
        order = Order(server_round, secrets.token_hex(8), mode, download, download, self.keep).record()
        for message in messages:
            message.content = RecordDict({**message.content, ARRAYS: packed, ORDER: order})
            self._now.downlink_bytes += message_bytes(message)
        return messages

    def state(self) -> dict[str, Any]:
        """All but the model that a later run needs to go on, as JSON."""
        return {
            "clients": [client.model_dump() for client in self.clients.values()], "fine": self.fine.state(),
            "rounds": [one.model_dump() for one in self.rounds], "seen": sorted(self.guard.seen),
            "chosen": sorted(self._chosen.items()), "steps": self.sums.steps if self.sums else {},
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`; give `start` the arrays of then."""
        clients = [ClientRecord.model_validate(one) for one in state["clients"]]
        self.clients = {client.node: client for client in clients}
        self.rounds = [RoundRecord.model_validate(one) for one in state["rounds"]]
        self.fine.restore(state["fine"])
        self.guard.seen, self._chosen = set(state["seen"]), dict(state["chosen"])
        if self.sums is not None:
            self.sums.steps = dict(state["steps"])

    def _nodes(self, grid: Grid, timeout: float) -> list[int]:
        end = time.monotonic() + timeout
        while len(nodes := sorted(grid.get_node_ids())) < self.min_available_nodes:
            if time.monotonic() > end:
                raise MoqaError(f"{len(nodes)} of {self.min_available_nodes} clients are there", "start more nodes")
            time.sleep(1.0)
        return nodes

    def _measure(
        self, arrays: ArrayRecord, grid: Grid, nodes: Sequence[int], present: Sequence[int], timeout: float
    ) -> None:
        """Ask nodes of those that are present what they are like."""
        if not nodes:
            return
        state = state_of(arrays)
        download, mode = Packing(state, self.download_bits), LocalMode("ptq", self.bits)
        packed = arrays_of(download.pack(state))
        order = Order(0, secrets.token_hex(8), mode, download, download, self.keep, self.epsilon)
        content = RecordDict({ARRAYS: packed, ORDER: order.record()})
        messages = [Message(content=content, message_type=f"query.{ACTION}", dst_node_id=node) for node in nodes]
        self._now.downlink_bytes += sum(map(message_bytes, messages))
        replies, arrived = gather(grid, messages, timeout)
        for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
            self._now.uplink_bytes += message_bytes(reply)
            node = reply.metadata.src_node_id
            before = self.clients.get(node)
            others = {self.clients[other].number for other in present if other in self.clients and other != node}
            try:
                client = described(reply, others)
            except UpdateError as reason:
                self._now.refused.append(f"client at node {node}: {reason}")
                if not reply.has_error():  # one that failed is asked again
                    self._unfit.add(node)
                continue
            if before is not None:
                client.latency, client.strikes = before.latency, before.strikes
            elif self.clock is None:
                client.latency = arrived[node]
            self._forget(client.number, node)
            self.clients[client.node] = client
        if not self.clients:
            raise MoqaError("no client can take part", "; ".join(self._now.refused) or "none has answered")

    def _forget(self, number: int, now: int) -> None:
        """Drop the node that a client had before: one that was killed comes back as another."""
        for node in [node for node, known in self.clients.items() if known.number == number and node != now]:
            del self.clients[node]
            self._chosen.pop(node, None)

    def _allocate(self, server_round: int, able: Sequence[int], arrays: ArrayRecord) -> None:
        clients = [self.clients[node] for node in able]
        state = state_of(arrays)
        down = Packing(state, self.download_bits).length
        sizes = [down + Packing(state, choice.upload).length for choice in self.choices]
        options = options_of(clients, self.choices, sizes, self.link)
        kept = options.gains / options.gains.max(1, keepdims=True)
        self._expected = dict(zip(able, kept.tolist(), strict=True))
        if any(node not in self._chosen for node in able):
            found = first_choice(self.allocation, options, self.limits, self.seed)
            for index, node in enumerate(able):
                self._chosen.setdefault(node, int(found[index]))
        elif self.allocation == "coarse+fine":
            self._adjust(server_round, able, options)

    def _adjust(self, server_round: int, able: Sequence[int], options: ModeOptions) -> None:
        clients = [self.clients[node] for node in able]
        modes = np.array([self._chosen[node] for node in able])
        numbers = [client.number for client in clients]
        found, lines = self.fine.propose(
            server_round, numbers, modes, features_of(clients), options, self.limits, rounds=self._rounds
        )
        self._chosen |= {node: int(mode) for node, mode in zip(able, found, strict=True)}
        self._now.changes += lines

    def _seconds(self, client: ClientRecord, order: Order, bytes_: int) -> float | None:
        if self.clock is not None:
            return self.clock.seconds(client.number, order.mode.kind, client.samples, bytes_)
        return self._arrived.get(client.node)

    def _empty(self, grid: Grid, node: int, most: float) -> float:
        if self.clock is not None:
            return 0.0
        content = RecordDict({EMPTY: ConfigRecord()})
        message = Message(content=content, message_type=f"query.{ACTION}", dst_node_id=node)
        return gather(grid, [message], most)[1].get(node, most)

    def _averaged(self, server_round: int, contents: Sequence[RecordDict]) -> MetricRecord | None:
        counted = [
            content
            for content in contents
            if any(self.weighted_by_key in one for one in content.metric_records.values())
        ]
        try:
            return self.train_metrics_aggr_fn(counted, self.weighted_by_key) if counted else None
        except Exception as error:  # clients send what they like, and Flower adds it up as it is
            self._now.refused.append(f"round {server_round}: metrics are not averaged: {one_line(error)}")
            return None

    def _evaluate_on_clients(
        self, number: int, arrays: ArrayRecord, config: ConfigRecord | None, grid: Grid, timeout: float, result: Result
    ) -> None:
        if self.fraction_evaluate == 0.0:
            return
        messages = list(self.configure_evaluate(number, arrays, config or ConfigRecord(), grid))
        replies, _ = gather(grid, messages, timeout)
        metrics = self.aggregate_evaluate(number, replies)
        if metrics is not None:
            result.evaluate_metrics_clientapp[number] = metrics
