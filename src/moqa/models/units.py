"""Units: the weight matrices of a model, each with its own precision."""

from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal[
    "expert", "shared", "attention", "mlp", "convolution", "vision", "projector", "language", "action"
]  # fmt: skip
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Unit:
    """One weight matrix, e.g. expert 7's `down_proj` of layer 3.

    >>> unit = view.units["model.layers.3.mlp.experts.7.down_proj"]
    >>> unit.layer, unit.role, unit.expert, unit.projection, unit.shape
    (3, 'expert', 7, 'down_proj', (256, 256))

    Attributes:
        name: path in the model; experts of a stacked parameter get their index in the path.
        layer: index of the block, a decoder layer in most models.
        role: `expert` (routed), `shared` (an expert that sees every token), `attention` (whatever mixes tokens),
            `mlp` (the feed-forward part of a dense layer), `convolution`, or in a policy the part of it: `vision`,
            `projector`, `language` or `action`.
        projection: last word of the name.
        expert: index of the routed expert, None for other roles.
        shape: (out, in) of the matrix as it multiplies a column of activations; of a convolution, (out, patch).
        module: path of the module that multiplies with the matrix.
        parameter: path of the parameter that holds it, alone or with others.
    """

    name: str
    layer: int
    role: Role
    projection: str
    expert: int | None
    shape: tuple[int, int]
    module: str
    parameter: str

    @property
    def weights(self) -> int:
        """Number of weights in the matrix."""
        return self.shape[0] * self.shape[1]
