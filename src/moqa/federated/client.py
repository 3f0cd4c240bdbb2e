"""What a Flower app adds on its clients: a mod, a `with` block around its training, and a function that measures."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from moqa.errors import MoqaError
from moqa.federated import secure_client
from moqa.federated.common_grid import CommonGrid, masked_update
from moqa.federated.flower import ClientAppCallable, ConfigRecord, Context, Message, MetricRecord, RecordDict
from moqa.federated.measure import Loss, batch_loss, measure, probe_loss
from moqa.federated.modes import FULL, LocalMode, in_mode
from moqa.federated.order import ARRAYS, EMPTY, FACTS, ORDER, Order, arrays_of, payload, record_of, state_of
from moqa.federated.updates import State, packed_update

_RESIDUAL = "moqa-residual"


def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower mod: the app sees plain arrays, the wire has packed ones.

    >>> app = ClientApp(mods=[mod])  # doctest: +SKIP

    What rounding takes from an update is kept in the client's state and added to its next one. Messages of other
    strategies pass as they are.
    """
    if EMPTY in message.content:
        return Message(RecordDict({}), reply_to=message)
    if secure_client.step_of(message) not in (None, "train"):
        try:
            return secure_client.answered(message, context)
        except MoqaError as error:
            return _failed(message, {}, error)
    order = Order.of(message)
    if order is None:
        return call_next(message, context)
    before = order.download.unpack(payload(message.content, order.download.length))
    message.content[ARRAYS] = record_of(before)
    said: dict[str, Any] = {"round": order.round, "nonce": order.nonce}
    if "partition-id" in context.node_config:
        said["partition"] = int(context.node_config["partition-id"])
    try:
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        if message.metadata.message_type.startswith("train"):
            after = state_of(reply.content.array_records[ARRAYS])
            reply.content[ARRAYS] = arrays_of(_upload(order, before, after, message, context))
    except MoqaError as error:
        return _failed(message, said, error)
    if FACTS in message.content:
        reply.content[FACTS] = message.content[FACTS]
    reply.content[ORDER] = ConfigRecord(said)
    return reply


def _upload(order: Order, before: State, after: State, message: Message, context: Context) -> bytes:
    """The update as bytes; what they do not say is kept for the next one."""
    records = context.state.array_records
    residual = state_of(records[_RESIDUAL]) if _RESIDUAL in records else {}
    if isinstance(order.upload, CommonGrid):
        numbers, left = masked_update(order.upload, before, after, residual)
        data = order.upload.pack(secure_client.mask(numbers, message, context))
    else:
        data, left = packed_update(order.upload, before, after, residual)
    context.state[_RESIDUAL] = record_of(left)
    return data


def _failed(message: Message, said: dict[str, Any], error: MoqaError) -> Message:
    return Message(RecordDict({ORDER: ConfigRecord({**said, "error": str(error)})}), reply_to=message)


@contextmanager
def local(
    model: nn.Module, message: Message, *, probe: Any = None, loss: Loss | None = None
) -> Iterator[nn.Module]:  # fmt: skip
    """Train a model in the mode that the server chose for this client.

    >>> with local(model, message, probe=next(iter(loader))):  # doctest: +SKIP
    ...     train(model, loader)

    Afterwards the model has its exact weights. Make the optimizer inside the block.

    Args:
        model: with the weights of the message.
        message: that the client app was called with.
        probe: a batch on which the trained model is measured, as it is and rounded: from what rounding costs the server
            learns what each mode brings on this client.
        loss: of model and batch; by default cross-entropy, or what a transformers model returns.

    Raises:
        MoqaError: if the model cannot be rounded, naming the module.
    """
    order = Order.of(message)
    if order is None:
        yield model
        return
    facts = dict[str, Any]()
    start = time.perf_counter()
    with in_mode(model, order.mode, order.keep):
        yield model
    facts["seconds"] = time.perf_counter() - start
    if probe is not None and order.mode.kind != "fp":
        few, exact = LocalMode("ptq", order.mode.bits), LocalMode("fp", FULL)
        facts["loss"], facts["loss-rounded"] = (
            probe_loss(model, probe, mode, order.keep, loss or batch_loss) for mode in (exact, few)
        )
    message.content[FACTS] = MetricRecord(facts)


def measured(message: Message, model: nn.Module, batches: Iterable[Any], *, loss: Loss | None = None) -> Message:
    """Answer the server's question what this client is like: train a copy of the model for some batches in each mode.

    >>> @app.query("moqa")  # doctest: +SKIP
    ... def measure(message, context):
    ...     return measured(message, model, loader)

    Args:
        message: that the client app was called with.
        model: with the weights of the message.
        batches: all data of the client, see `moqa.federated.measure.measure`.
        loss: of model and batch.

    Raises:
        MoqaError: if the client has no data, or the model cannot be rounded.
    """
    order = Order.of(message)
    if order is None:
        raise MoqaError("this message is not from moqa.federated.FedHQ", "use it as the server's strategy")
    found = measure(model, batches, order.mode.bits, keep=order.keep, loss=loss, epsilon=order.epsilon)
    facts: dict[str, Any] = {
        "samples": found.samples, "histogram": found.histogram, "damage": found.damage, "loss": found.loss,
        "loss-rounded": found.loss_rounded, **{f"seconds.{kind}": value for kind, value in found.per_sample.items()},
    }  # fmt: skip
    return Message(RecordDict({FACTS: MetricRecord(facts)}), reply_to=message)
