"""Updates that are not taken, each with its reason, and clients that are left out for what they do."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch

from moqa.federated.flower import Message
from moqa.federated.order import ACTION, FACTS, ORDER, Order, payload
from moqa.federated.records import ClientRecord
from moqa.federated.updates import State, UpdateError

# a client that takes three times as long as it says, or a third of it, in two rounds in a row is left out; so is one
# that says it has trained for more seconds than there were, by clocks that differ by less than a tenth
_FACTOR, _DRIFT, _STRIKES = 3.0, 1.1, 2
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


@dataclass(frozen=True)
class Timing:
    """How long a client took for a round, and what it says of it.

    Attributes:
        taken: seconds from order to update, of the server's clock.
        claimed: seconds of training and of the link, as the client had said before its first round.
        reported: seconds that it says it has trained in this round; None if it says nothing.
    """

    taken: float
    claimed: float
    reported: float | None = None

    @property
    def own(self) -> float:
        """The most that it says of its training: several epochs take longer than it had said before."""
        return max(self.claimed, self.reported or 0.0)

    @property
    def is_too_long(self) -> bool:
        """Whether it says that it needs more than it took."""
        return self.claimed > _FACTOR * self.taken or (self.reported or 0.0) > _DRIFT * self.taken

    @property
    def beyond(self) -> float:
        """Seconds in which it did not train, if that is true."""
        return self.taken - self.own


def liars(
    clients: Iterable[ClientRecord], timings: Mapping[int, Timing], empty: Callable[[int, float], float]
) -> list[str]:
    """Count rounds in a row in which clients said what cannot be; the second one excludes them.

    A client may start slowly, and train slowly if it says so. It cannot have trained for longer than the round took,
    and what it did not train, a message that asks for nothing must take, too. Between the two rounds it is to be asked
    again what it is like: what it had said may have been measured in a bad moment.

    Args:
        clients: that may have answered.
        timings: of the round, by node.
        empty: sends a node a message that asks for nothing, and waits for some seconds; returns those until the answer,
            or all of them. It is called for clients whose time nothing else explains.

    Returns:
        A line for every client that is excluded.
    """
    those = [client for client in clients if client.node in timings]
    # what messages take beyond the first answer with most clients is nobody's lie
    over = {client.node: timings[client.node].beyond - client.latency for client in those}
    common = max(float(np.median([*over.values()])), 0.0) if over else 0.0
    least = max((timing.taken for timing in timings.values()), default=0.0) / 4  # less is no matter
    lines = []
    for client in those:
        if client.excluded:
            continue
        timing, why = timings[client.node], ""
        if timing.is_too_long and timing.own - timing.taken > least:
            why = f"it said {timing.own:.3g} s, and took {timing.taken:.3g} s"
        elif over[client.node] - common > max((_FACTOR - 1) * timing.own, least):
            enough = (timing.taken - common - _FACTOR * timing.own) / _FACTOR
            start = empty(client.node, enough)
            if start < enough:
                why = f"it said {timing.own:.3g} s, and took {timing.taken:.3g} s; an empty message takes {start:.3g} s"
            else:
                client.latency = max(client.latency, timing.beyond)
        client.strikes = client.strikes + 1 if why else 0
        if client.strikes >= _STRIKES:
            client.excluded = f"{why}, {client.strikes} rounds in a row"
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


def seconds_of(facts: Any) -> float | None:
    """Seconds of training that a client says a round has taken; None if it says none, or what cannot be.

    >>> seconds_of({"seconds": 2})
    2.0
    """
    try:
        found = float(facts["seconds"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return found if 0 <= found < np.inf else None


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
