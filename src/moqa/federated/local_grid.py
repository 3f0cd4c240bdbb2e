"""Clients in this process, one after the other: Flower's messages without its servers, for simulations and tests."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from moqa.federated.flower import ClientApp, Context, Error, Grid, Message, RecordDict, TaskIdentity, check_flower
from moqa.federated.order import record_of, state_of
from moqa.federated.updates import State

_RUN, _SERVER = 1, 1
_FAILED = 3  # Flower's code of a client app that raised


class LocalGrid(Grid):
    """Runs a client app for every client when its reply is asked for.

    >>> len(list(LocalGrid(ClientApp(), clients=3).get_node_ids()))
    3

    Messages have Flower's own types and are called through the app's mods. Nodes have the numbers of their data.

    Args:
        app: of the clients.
        clients: number of them.
        config: of the run, which the app finds in its context.
    """

    def __init__(self, app: ClientApp, clients: int, config: Mapping[str, Any] | None = None) -> None:
        check_flower()
        # Flower sets these where it starts an app in a process of its own
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = _RUN, _SERVER, _RUN
        self._app, self._pending, self._count = app, dict[str, Message](), 0
        self._contexts = {
            number: Context(
                run_id=_RUN, node_id=number, node_config={"partition-id": number, "num-partitions": clients},
                state=RecordDict(), run_config=dict(config or {}),
            )
            for number in range(clients)
        }  # fmt: skip

    @property
    def run(self) -> Any:
        """Flower's record of the run: there is none."""
        raise NotImplementedError

    def set_run(self, run: Any) -> None:
        """See `Grid`."""

    def create_message(  # noqa: D102
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Numbers of the clients."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep messages until their replies are asked for."""
        found = []
        for message in messages:
            self._count += 1
            identifier = f"{self._count:064d}"  # as long as Flower's
            message.metadata.__dict__["_message_id"] = identifier
            self._pending[identifier] = message
            found.append(identifier)
        return found

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the clients that these messages went to."""
        replies = []
        for identifier in message_ids:
            message = self._pending.pop(identifier, None)
            if message is not None:
                replies.append(self._answer(message))
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """See `Grid`; clients have all the time they need, and the reply of each is there."""
        del timeout
        return self.pull_messages(list(self.push_messages(messages)))

    def residuals(self) -> State:
        """Tensors that clients keep between rounds, by number of the client and name."""
        return {
            f"{number}.{kept}.{name}": tensor
            for number, context in self._contexts.items()
            for kept, record in context.state.array_records.items()
            for name, tensor in state_of(record).items()
        }

    def restore(self, residuals: State) -> None:
        """Give clients the tensors that they kept."""
        found = dict[tuple[int, str], State]()
        for path, tensor in residuals.items():
            number, kept, name = path.split(".", 2)
            found.setdefault((int(number), kept), {})[name] = tensor
        for (client, kept), state in found.items():
            self._contexts[client].state[kept] = record_of(state)

    def _answer(self, message: Message) -> Message:
        # a client gets a copy of the records, as it would over a wire
        own = copy.copy(message)
        own.content = RecordDict(dict(message.content.items()))
        try:
            return self._app(own, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # whatever a client's code raises costs its update only
            return Message(Error(_FAILED, f"{type(error).__name__}: {error}"), reply_to=message)
