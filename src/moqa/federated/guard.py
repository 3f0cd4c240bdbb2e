"""Updates that are not taken, each with its reason, and clients that are left out for what they do."""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch

from moqa.federated.flower import Message
from moqa.federated.order import ACTION, FACTS, ORDER, Order, payload
from moqa.federated.records import ClientRecord
from moqa.federated.updates import State, UpdateError

# a client that takes three times as long as it said, in two rounds, is left out
_SLOWER, _STRIKES = 3.0, 2
# what no client has: seconds of a sample, samples, classes
_LONGEST, _MOST, _CLASSES = 1e6, 10**12, 2**17


@dataclass
class UpdateGuard:
    """Takes every update once, if it answers the order of this round.

    Attributes:
        seen: hashes of all updates so far.
        issued: orders of this round that were not answered yet, by node.
    """

    seen: set[str] = field(default_factory=set)
    issued: dict[int, Order] = field(default_factory=dict)

    def accept(self, reply: Message) -> tuple[Order, State]:
        """The order that a reply answers, and its update.

        Raises:
            UpdateError: saying why: failed, replayed, malformed, oversized, of a wrong shape, not finite.
        """
        if reply.has_error():
            raise UpdateError(f"failed ({reply.error.reason or reply.error.code})")
        said: Any = reply.content.config_records.get(ORDER, {})
        if "error" in said:
            raise UpdateError(f"failed ({said['error']})")
        order = self.issued.get(reply.metadata.src_node_id)
        if order is None:
            raise UpdateError("nobody asked for it, or it was answered before")
        if said.get("nonce") != order.nonce:
            raise UpdateError(f"replayed: it answers another order than that of round {order.round}")
        del self.issued[reply.metadata.src_node_id]
        data = payload(reply.content, order.upload.length)
        digest = hashlib.sha256(data).hexdigest()
        if digest in self.seen:
            raise UpdateError("replayed: the same bytes as an earlier update")
        update = order.upload.unpack(data)
        self.seen.add(digest)
        return order, update


def liars(
    clients: Iterable[ClientRecord], taken: Mapping[int, float], claimed: Mapping[int, float], deadline: float
) -> list[str]:
    """Count rounds in which clients took much longer, or much less, than they had said; the second one excludes them.

    Args:
        clients: that may have answered.
        taken: seconds from order to update, by node.
        claimed: seconds of training and of the link as the client has said, by node.
        deadline: seconds of a round; less than half of it is never much longer.

    Returns:
        A line for every client that is excluded.
    """
    those = [client for client in clients if client.node in taken]
    # messages take their time: as much as with the first answer, and about the same with everyone
    over = {client.node: taken[client.node] - claimed[client.node] - client.latency for client in those}
    common = max(float(np.median([*over.values()])), 0.0) if over else 0.0
    lines = []
    for client in those:
        if client.excluded:
            continue
        seconds, said = taken[client.node], claimed[client.node]
        excess = over[client.node] - common
        slower = excess > (_SLOWER - 1) * said and excess > deadline / 2
        client.strikes += slower or seconds * _SLOWER < said
        if client.strikes >= _STRIKES:
            client.excluded = f"it said {said:.3g} s, and took {seconds:.3g} s, in {client.strikes} rounds"
            lines.append(f"client {client.number} excluded: {client.excluded}")
    return lines


def described(reply: Message, taken: Collection[int]) -> ClientRecord:
    """What a client says of itself.

    Args:
        reply: to the query before its first round.
        taken: numbers of other clients: two that say they have the same data are told apart.

    Raises:
        UpdateError: if it failed, or says what cannot be.
    """
    if reply.has_error():
        raise UpdateError(f"failed ({reply.error.reason or reply.error.code})")
    said: Any = reply.content.config_records.get(ORDER, {})
    if "error" in said:
        raise UpdateError(str(said["error"]))
    facts: Any = reply.content.metric_records.get(FACTS, {})
    number = said.get("partition")
    if not isinstance(number, int) or number in taken:
        number = next(free for free in count() if free not in taken)
    try:
        times = {kind: float(facts[f"seconds.{kind}"]) for kind in ("fp", "ptq", "qat")}
        histogram = [float(count) for count in facts["histogram"]]
        record = ClientRecord(
            number=number, node=reply.metadata.src_node_id, samples=int(facts["samples"]),
            per_sample=times, histogram=histogram, damage=float(facts["damage"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UpdateError(f"does not say what it is like ({error}): does its app answer `query.{ACTION}`?") from None
    numbers = torch.tensor([*times.values(), *histogram, record.damage])
    if not numbers.isfinite().all() or (numbers < 0).any() or min(times.values()) == 0 or record.samples < 1:
        raise UpdateError("says what cannot be: times, counts and samples must be positive")
    if max(times.values()) > _LONGEST or record.samples > _MOST or len(histogram) > _CLASSES:
        raise UpdateError("says what cannot be: too long a time, too many samples or too many classes")
    return record


def gain_of(facts: Any) -> float | None:
    """What rounding costs a trained model: 0 if its loss on the probe batch stays, -1 if it doubles, or worse.

    >>> gain_of({"loss": 1.0, "loss-rounded": 1.5})
    -0.5

    Args:
        facts: that a client sent; None, or whatever else, if it measured nothing.
    """
    try:
        exact, few = float(facts["loss"]), float(facts["loss-rounded"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    # bounded, so that a client that lies cannot move the regression far
    share = (exact - few) / max(abs(exact), 1e-9)
    return float(np.clip(share, -1.0, 1.0)) if np.isfinite(share) else None
