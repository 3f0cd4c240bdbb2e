"""Secure aggregation as the server sees it: keys, sealed shares, masked updates, and what unmasks their sum."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moqa.federated.flower import ConfigRecord, Grid, Message, RecordDict, message_bytes
from moqa.federated.masks import Public, Vector, unmasked
from moqa.federated.order import ACTION, ORDER, SECURE
from moqa.federated.replies import gather
from moqa.federated.updates import UpdateError


class SecureRound:
    """The masks of one round.

    Args:
        grid: Flower's way to the clients.
        number: of the round.
        timeout: seconds of a step.

    Attributes:
        down: bytes that were sent for masks, by node.
        up: bytes that came for them, by node.
        dropped: clients that have left in a step before updates, by node, with the reason.
    """

    def __init__(self, grid: Grid, number: int, timeout: float) -> None:
        self._grid, self._number, self._timeout = grid, number, timeout
        self.down, self.up, self.dropped = Counter[int](), Counter[int](), dict[int, str]()
        self._publics, self._sealed = dict[int, Public](), dict[int, dict[int, bytes]]()
        self.threshold = 0

    def agree(self, nodes: Sequence[int]) -> list[int]:
        """Exchange keys and shares of secrets; returns the nodes that can send masked updates.

        Raises:
            UpdateError: if too many have left for a sum that hides each of them.
        """
        self.threshold = threshold_of(len(nodes))
        for node, said in self._ask("keys", {node: {} for node in nodes}).items():
            public = list(said.get("public", ()))
            if len(public) == 2 and all(isinstance(key, bytes) for key in public):
                self._publics[node] = (public[0], public[1])
            else:
                self.dropped[node] = "has sent no keys"
        keys: dict[str, Any] = {
            "nodes": list(self._publics), "public": [key for pair in self._publics.values() for key in pair],
            "threshold": self.threshold,
        }  # fmt: skip
        self._enough(len(self._publics), "have sent keys")
        for node, said in self._ask("shares", dict.fromkeys(self._publics, keys)).items():
            sealed = dict(zip(said.get("nodes", ()), said.get("sealed", ()), strict=False))
            if sealed.keys() == self._publics.keys():
                self._sealed[node] = sealed
            else:
                self.dropped[node] = "has not sent a share for every client"
        self._enough(len(self._sealed), "have sent shares of their secrets")
        return list(self._sealed)

    def address(self, message: Message) -> None:
        """Add to a client's order what it masks its update with."""
        node = message.metadata.dst_node_id
        nodes = list(self._sealed)
        sealed = [self._sealed[other][node] for other in nodes]
        message.content[SECURE] = self._record("train", {"nodes": nodes, "sealed": sealed})

    def sum(self, updates: Mapping[int, Vector]) -> Vector:
        """The sum of masked updates without the masks.

        Args:
            updates: that have arrived, by node.

        Raises:
            UpdateError: if too few are there, or too few clients help to unmask.
        """
        self._enough(len(updates), "have sent an update")
        here, gone = list(updates), [node for node in self._sealed if node not in updates]
        found = self._ask("reveal", {node: {"here": here, "gone": gone} for node in here})
        told = [
            said
            for said in found.values()
            if len(said.get("seeds", ())) == len(here) and len(said.get("masks", ())) == len(gone)
        ]
        self._enough(len(told), "have helped to unmask")
        told = told[: self.threshold]
        seeds = [[said["seeds"][at] for said in told] for at in range(len(here))]
        masks = {node: [said["masks"][at] for said in told] for at, node in enumerate(gone)}
        total = np.stack(list(updates.values())).sum(0, dtype=np.uint32)
        try:
            return unmasked(total, seeds, masks, {node: self._publics[node] for node in self._sealed})
        except ValueError as error:
            raise UpdateError(f"the masks cannot be taken off ({error})") from None

    def _ask(self, step: str, what: Mapping[int, Mapping[str, Any]]) -> dict[int, Any]:
        messages = [
            Message(RecordDict({SECURE: self._record(step, said)}), message_type=f"query.{ACTION}", dst_node_id=node)
            for node, said in what.items()
        ]
        self.down.update({message.metadata.dst_node_id: message_bytes(message) for message in messages})
        found = dict[int, Any]()
        for reply in gather(self._grid, messages, self._timeout)[0]:
            node = reply.metadata.src_node_id
            self.up[node] += message_bytes(reply)
            if reply.has_error():
                self.dropped[node] = f"failed ({reply.error.reason or reply.error.code})"
            elif "error" in reply.content.config_records.get(ORDER, {}):
                self.dropped[node] = str(reply.content.config_records[ORDER]["error"])
            else:
                found[node] = reply.content.config_records.get(SECURE, {})
        for node in what.keys() - found.keys() - self.dropped.keys():
            self.dropped[node] = f"has not answered the step {step}"
        return {node: found[node] for node in what if node in found}

    def _record(self, step: str, said: Mapping[str, Any]) -> ConfigRecord:
        return ConfigRecord({"step": step, "round": self._number, **said})

    def _enough(self, found: int, what: str) -> None:
        if found < self.threshold:
            reasons = "; ".join(f"node {node} {reason}" for node, reason in self.dropped.items())
            raise UpdateError(
                f"{found} clients {what}, and {self.threshold} are needed" + (f": {reasons}" if reasons else "")
            )


def threshold_of(clients: int) -> int:
    """How many clients must be there to the end: more than two thirds.

    >>> threshold_of(10)
    7
    """
    return 2 * clients // 3 + 1
