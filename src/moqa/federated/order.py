"""What the server asks of a client, and how both put it in Flower's records."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moqa.federated.common_grid import CommonGrid
from moqa.federated.flower import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from moqa.federated.modes import Kind, LocalMode
from moqa.federated.updates import Packing, State, UpdateError

# records of a message, and the name of its one array
ARRAYS, METRICS, ORDER, FACTS, PAYLOAD = "arrays", "metrics", "moqa", "moqa-facts", "moqa"
SECURE = "moqa-secure"  # record of a step of secure aggregation
EMPTY = "moqa-empty"  # record of a question that the mod answers with nothing
ACTION = "moqa"  # of the query that measures a client


@dataclass(frozen=True)
class Order:
    """What a client is asked to do in a round.

    Attributes:
        round: its number.
        nonce: that the reply must repeat, so that a reply of another round is known.
        mode: in which the client trains.
        download: how the model travels to the client.
        upload: how the update travels back: packed, or as numbers of a common grid under masks.
        keep: patterns of module names that are not rounded.
        epsilon: of local differential privacy of the histogram; None for none.
    """

    round: int
    nonce: str
    mode: LocalMode
    download: Packing
    upload: Packing | CommonGrid
    keep: tuple[str, ...] = ()
    epsilon: float | None = None

    def record(self) -> ConfigRecord:
        """As a record of a message."""
        layout = {
            name: [str(tensor.dtype).removeprefix("torch."), *tensor.shape] for name, tensor in self.upload.like.items()
        }
        fields: dict[str, Any] = {
            "round": self.round, "nonce": self.nonce, "kind": self.mode.kind, "bits": self.mode.bits,
            "download": self.download.bits, "upload": self.upload.bits, "keep": json.dumps(self.keep),
            "layout": json.dumps(layout, separators=(",", ":")),
        }  # fmt: skip
        if self.epsilon is not None:
            fields["epsilon"] = self.epsilon
        if isinstance(self.upload, CommonGrid):
            grid = {"clients": self.upload.clients, "steps": dict(self.upload.steps), "share": self.upload.share}
            fields["grid"] = json.dumps(grid)
        return ConfigRecord(fields)

    @classmethod
    def of(cls, message: Message) -> "Order | None":
        """The order in a message; None if the server runs another strategy."""
        if ORDER not in message.content:
            return None
        fields = message.content.config_records[ORDER]
        like = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            for name, (dtype, *shape) in json.loads(str(fields["layout"])).items()
        }
        mode, epsilon = LocalMode(_kind(fields), int(fields["bits"])), fields.get("epsilon")  # type: ignore[arg-type]
        bits = int(fields["upload"])  # type: ignore[arg-type]
        upload: Packing | CommonGrid = Packing(like, bits)
        if "grid" in fields:
            upload = CommonGrid(like, bits, **json.loads(str(fields["grid"])))
        return cls(
            int(fields["round"]), str(fields["nonce"]), mode, Packing(like, int(fields["download"])), upload,  # type: ignore[arg-type]
            tuple(json.loads(str(fields["keep"]))),
            None if epsilon is None else float(epsilon),  # type: ignore[arg-type]
        )  # fmt: skip


def arrays_of(data: bytes) -> ArrayRecord:
    """Bytes as the one array of a record."""
    return ArrayRecord({PAYLOAD: Array(np.frombuffer(data, np.uint8))})


def payload(content: RecordDict, most: int) -> bytes:
    """The bytes in a message.

    Args:
        content: of the message.
        most: bytes that are expected; many more are not even read.

    Raises:
        UpdateError: if there are none, or too many.
    """
    record = content.array_records.get(ARRAYS)
    if record is None or list(record) != [PAYLOAD]:
        raise UpdateError("no packed update: is `moqa.federated.mod` among the client's mods?")
    array = record[PAYLOAD]
    # numpy's header is below 1 KiB
    if len(array.data) > most + 1024:
        raise UpdateError(f"oversized: {len(array.data):,} bytes instead of {most:,}")
    try:
        values = array.numpy()
    except Exception as error:  # numpy raises many kinds for bytes that are not an array
        raise UpdateError(f"not an array ({type(error).__name__})") from None
    if values.dtype != np.uint8:
        raise UpdateError(f"an array of {values.dtype}, not of bytes")
    return values.tobytes()


def state_of(record: ArrayRecord) -> State:
    """Tensors of a record, by name."""
    return dict(record.to_torch_state_dict())


def record_of(state: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """A record of tensors."""
    return ArrayRecord({name: Array(tensor.detach().cpu().numpy()) for name, tensor in state.items()})


def _kind(fields: Mapping[str, object]) -> Kind:
    return str(fields["kind"])  # type: ignore[return-value]
