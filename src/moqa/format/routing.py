"""Which experts the known distributions use, stored with a checkpoint: live traffic is compared with it."""

import math
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, Field, model_validator

from moqa.errors import MoqaError
from moqa.storage.artifact import check_signed, read_json, signed, write_json

ROUTING = "routing.json"
DIGITS = 6
_TOLERANCE = 1e-3  # of the sum of rounded shares

Shares = tuple[tuple[Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)], ...], ...]


class Routing(BaseModel, frozen=True):
    """The content of `routing.json`."""

    fingerprint: str = Field(description="of the original model")
    top_k: int = Field(ge=1, description="experts of each token")
    layers: tuple[int, ...] = Field(min_length=1, description="decoder layers with routed experts, ascending")
    known: dict[str, Shares] = Field(
        min_length=1, description="of each known distribution: for each of these layers, the share of each expert"
    )
    checksum: str = ""

    @model_validator(mode="after")
    def _shares_are_shares(self) -> Self:
        for name, shares in self.known.items():
            if len(shares) != len(self.layers) or any(abs(math.fsum(layer) - 1) > _TOLERANCE for layer in shares):
                raise ValueError(f"{name} must have shares with a sum of 1 for each of {len(self.layers)} layers")
        if len({tuple(map(len, shares)) for shares in self.known.values()}) > 1:
            raise ValueError("the distributions have different numbers of experts")
        return self


def write_routing(folder: Path, routing: Routing) -> None:
    """Write the routing of the known distributions into a checkpoint's folder."""
    write_json(signed(routing), folder / ROUTING)


def read_routing(folder: str | Path, fingerprint: str) -> Routing:
    """Read the routing of the known distributions of a checkpoint, made from the original with this fingerprint.

    >>> sorted(read_routing("runs/out", checkpoint.manifest.fingerprint).known)
    ['novels', 'wiki']

    Raises:
        MoqaError: if the checkpoint has no routing, or it was changed or is of another model.
    """
    path = Path(folder) / ROUTING
    if not path.is_file():
        raise MoqaError(
            f"{folder} does not say how its known texts are routed ({ROUTING} is missing)",
            "quantize a model with routed experts again with this moqa, or do not watch for drift",
        )
    routing = read_json(Routing, path)
    check_signed(path, routing.checksum)
    if routing.fingerprint != fingerprint:
        raise MoqaError(f"{path} is of another model ({routing.fingerprint[:8]})", f"{folder} is of {fingerprint[:8]}")
    return routing
