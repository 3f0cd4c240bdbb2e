"""Replies to messages, and when each of them came."""

import time
from collections.abc import Sequence

from moqa.federated.flower import Grid, Message

_EVERY = 0.2  # seconds between questions for replies


def gather(grid: Grid, messages: Sequence[Message], timeout: float) -> tuple[list[Message], dict[int, float]]:
    """Send messages and wait for the replies.

    Args:
        grid: Flower's way to the clients.
        messages: one for each node.
        timeout: seconds after which those that are missing are not waited for.

    Returns:
        The replies, and seconds until each came, by node: of the server's clock, so no client can change them.
    """
    began = time.monotonic()
    nodes = (message.metadata.dst_node_id for message in messages)
    waiting = {name: node for name, node in zip(grid.push_messages(messages), nodes, strict=True) if name}
    replies, arrived = list[Message](), dict[int, float]()
    while waiting:
        for reply in grid.pull_messages(sorted(waiting)):
            node = waiting.pop(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
            if reply.has_error():  # for a node that is gone, the SuperLink answers in its own name
                reply.metadata.__dict__["_src_node_id"] = node
            replies.append(reply)
            arrived[reply.metadata.src_node_id] = time.monotonic() - began
        if waiting and time.monotonic() - began > timeout:
            break
        if waiting:
            time.sleep(_EVERY)
    return replies, arrived
