"""Sums of masked updates, round after round: the grid that all clients share, and who is in the sum."""

from collections.abc import Mapping, Sequence

import numpy as np

from moqa.errors import MoqaError
from moqa.federated.common_grid import CommonGrid, check_bits
from moqa.federated.flower import Grid, Message
from moqa.federated.secure_server import SecureRound
from moqa.federated.updates import State

_FEWEST = 3


class SecureSums:
    """What a strategy needs of secure aggregation.

    Args:
        uploads: bits of updates; under masks all clients have the same.
        trim: of the strategy; it looks at single updates, which masks hide.
        clients: that a round waits for.

    Attributes:
        steps: of the grid of the next round; learned from every sum.
        round: masks of the present round.

    Raises:
        MoqaError: if the strategy needs what masks hide.
    """

    round: SecureRound

    def __init__(self, uploads: Sequence[int], trim: float, clients: int) -> None:
        if trim:
            raise MoqaError(f"trim={trim} with secure aggregation", "trimming looks at single updates: choose one")
        if len(set(uploads)) > 1:
            raise MoqaError(f"upload_bits={list(uploads)} with secure aggregation", "give one width: a sum has one")
        if clients < _FEWEST:
            raise MoqaError(
                f"min_available_nodes={clients} with secure aggregation", "give 3 or more: of 2, each knows the other"
            )
        self._bits = check_bits(uploads[0])
        self.steps = dict[str, float]()
        self._grids = dict[int, CommonGrid]()

    def uploads(self, state: State, samples: Mapping[int, int]) -> dict[int, CommonGrid]:
        """How the updates of a round travel, by node.

        Args:
            state: of the model.
            samples: of every client of the round, by node.
        """
        mean = sum(samples.values()) / max(len(samples), 1)
        self._grids = {
            node: CommonGrid(state, self._bits, len(samples), self.steps, count / mean)
            for node, count in samples.items()
        }
        return self._grids

    def begin(self, grid: Grid, number: int, timeout: float) -> SecureRound:
        """Masks of a new round."""
        self.round = SecureRound(grid, number, timeout)
        return self.round

    def agree(self, messages: Sequence[Message]) -> list[Message]:
        """Agree on masks; returns the messages to clients that have, with what they need.

        Raises:
            UpdateError: if too few have.
        """
        nodes = set(self.round.agree([message.metadata.dst_node_id for message in messages]))
        found = [message for message in messages if message.metadata.dst_node_id in nodes]
        for message in found:
            self.round.address(message)
        return found

    def mean(self, updates: Mapping[int, State]) -> State:
        """The mean of the updates of a round, weighted by samples.

        Args:
            updates: masked, by node.

        Raises:
            UpdateError: if too few clients are there, or help to unmask.
        """
        total = self.round.sum({node: update["masked"].numpy().astype(np.uint32) for node, update in updates.items()})
        grids = [self._grids[node] for node in updates]
        self.steps = grids[0].next_steps(total, len(grids))
        return grids[0].mean(total, len(grids), sum(grid.share for grid in grids))
