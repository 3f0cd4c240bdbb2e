"""What a client does in the four steps of secure aggregation; the app takes part in the third alone."""

from collections.abc import Sequence
from typing import Any

from moqa.errors import MoqaError
from moqa.federated.flower import ConfigRecord, Context, Message, RecordDict
from moqa.federated.masks import Public, Secrets, Vector
from moqa.federated.order import SECURE

_KEPT = "moqa-secrets"


def step_of(message: Message) -> str | None:
    """Name of the step that a message belongs to; None if updates are not masked."""
    return str(message.content.config_records[SECURE]["step"]) if SECURE in message.content else None


def answered(message: Message, context: Context) -> Message:
    """The reply to the first step (`keys`), the second (`shares`) or the last (`reveal`).

    Raises:
        MoqaError: if the server does not keep to the protocol.
    """
    said: Any = message.content.config_records[SECURE]
    reply = {"keys": _keys, "shares": _shares, "reveal": _revealed}[said["step"]](said, message, context)
    return Message(RecordDict({SECURE: ConfigRecord(reply)}), reply_to=message)


def mask(numbers: Vector, message: Message, context: Context) -> Vector:
    """Numbers of an update under the masks of this round.

    Raises:
        MoqaError: if too few clients take part, so that the sum would tell of this one.
    """
    said: Any = message.content.config_records[SECURE]
    kept, node = _kept(said, context), message.metadata.dst_node_id
    nodes = [int(other) for other in said["nodes"]]
    clients = _clients(kept)
    if len(nodes) < kept["threshold"] or node not in nodes or set(nodes) - clients.keys():
        raise MoqaError(f"{len(nodes)} clients are too few to hide among", f"{kept['threshold']} are needed")
    masked = _secrets(kept).masked(node, numbers, {other: clients[other] for other in nodes})
    context.state[_KEPT] = ConfigRecord({**kept, "sources": nodes, "sealed": list(said["sealed"])})
    return masked


def _keys(said: Any, message: Message, context: Context) -> dict[str, Any]:  # noqa: ARG001
    own = Secrets.fresh()
    context.state[_KEPT] = ConfigRecord({
        "round": said["round"], "mask": own.mask, "seal": own.seal, "seed": own.seed, "public": list(own.public)
    })  # fmt: skip
    return {"public": list(own.public)}


def _shares(said: Any, message: Message, context: Context) -> dict[str, Any]:
    kept, node = _kept(said, context), message.metadata.dst_node_id
    own, threshold = _secrets(kept), int(said["threshold"])
    nodes, publics = [int(other) for other in said["nodes"]], list(said["public"])
    clients = dict(zip(nodes, zip(publics[::2], publics[1::2], strict=True), strict=True))
    if not len(nodes) // 2 < threshold <= len(nodes) or threshold < 2:
        raise MoqaError(f"a threshold of {threshold} of {len(nodes)} clients does not protect", "give more than half")
    if len(set(publics)) != 2 * len(nodes) or clients.get(node) != own.public:
        raise MoqaError("the keys of the clients are not those that they have sent")
    context.state[_KEPT] = ConfigRecord({**kept, "nodes": nodes, "publics": publics, "threshold": threshold})
    sealed = own.shares(node, clients, threshold)
    return {"nodes": list(sealed), "sealed": list(sealed.values())}


def _revealed(said: Any, message: Message, context: Context) -> dict[str, Any]:
    kept, node = _kept(said, context), message.metadata.dst_node_id
    # one answer a round: two would give both secrets of a client away
    del context.state[_KEPT]
    here, gone = [int(other) for other in said["here"]], [int(other) for other in said["gone"]]
    sealed = dict(zip(kept.get("sources", ()), kept.get("sealed", ()), strict=True))
    if set(here) & set(gone) or len({*here, *gone}) != len(here) + len(gone) or {*here, *gone} - sealed.keys():
        raise MoqaError("the server asks for both secrets of a client, or for those of one that is not in the round")
    if len(here) < kept["threshold"]:
        raise MoqaError(f"a sum of {len(here)} updates tells too much", f"{kept['threshold']} are needed")
    own, clients = _secrets(kept), _clients(kept)
    opened = {other: own.opened(node, other, clients[other], sealed[other]) for other in (*here, *gone)}
    return {"seeds": [opened[other][0] for other in here], "masks": [opened[other][1] for other in gone]}


def _kept(said: Any, context: Context) -> dict[str, Any]:
    kept = dict(context.state.config_records.get(_KEPT, {}))
    if kept.get("round") != said["round"]:
        raise MoqaError(f"round {said['round']} has no secrets of this client: it was not asked for keys")
    return kept


def _secrets(kept: dict[str, Any]) -> Secrets:
    return Secrets(kept["mask"], kept["seal"], kept["seed"], _pair(kept["public"]))


def _clients(kept: dict[str, Any]) -> dict[int, Public]:
    publics = kept.get("publics", [])
    return {node: _pair(publics[2 * at : 2 * at + 2]) for at, node in enumerate(kept.get("nodes", ()))}


def _pair(keys: Sequence[bytes]) -> Public:
    return keys[0], keys[1]
