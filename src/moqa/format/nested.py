"""Nested widths: a narrower width of a unit is a bit for each weight, which rounds the wide value up or down."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from moqa.format.encodings.encoding import TensorSpec
from moqa.format.encodings.integers import plane_tensors, stored_grid
from moqa.format.grid import Neighbours
from moqa.format.layout import Shard, shards
from moqa.format.planes import pack, unpack
from moqa.format.scheme import Scheme
from moqa.format.tiles import PLANES

Value = TypeVar("Value")
_BITS = "bits"


@dataclass(frozen=True)
class Rounding:
    """How a unit is stored at a narrower width, beside what it is at the widest.

    >>> list(Rounding(Scheme(width=3)).tensors((256, 256)))
    ['bits', 'scale', 'zero']

    Attributes:
        scheme: of the unit at this width: integers on a grid.
    """

    scheme: Scheme

    def tensors(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Dtype and shape of every tensor that stores a unit of [out, in] weights, by suffix: a plane of bits, and the
        grid as it is stored alone.
        """
        alone = self.scheme.tensors(shape)
        tiles, blocks, _ = alone["p0"][1]
        return {_BITS: plane_tensors(1, tiles, blocks)["p0"], **_grid_of(alone)}

    def store(self, shape: tuple[int, int], alone: Mapping[str, Tensor], wide: Tensor) -> dict[str, Tensor]:
        """What is stored of a unit.

        Args:
            shape: (out, in).
            alone: its tensors as `Scheme.tensors` has them; integers are next to the wide values.
            wide: [out, in] its weights at the widest width, float32.
        """
        planes = [alone[f"p{index}"] for index in range(len(PLANES[self.scheme.width]))]
        bits = unpack(planes, self.scheme.width, shape) - self._lower(alone, wide)
        if int(bits.max()) > 1:
            raise ValueError("integers are not next to the wide values")
        return {_BITS: pack(bits, 1)[0], **_grid_of(alone)}

    def alone(self, shape: tuple[int, int], stored: Mapping[str, Tensor], wide: Tensor) -> dict[str, Tensor]:
        """The inverse of `store`: tensors by suffix as `Scheme.tensors` has them."""
        integers = self._lower(stored, wide) + unpack([stored[_BITS]], 1, shape)
        planes = {f"p{index}": plane for index, plane in enumerate(pack(integers, self.scheme.width))}
        return planes | _grid_of(stored)

    def _lower(self, stored: Mapping[str, Tensor], wide: Tensor) -> Tensor:
        return Neighbours.of(stored_grid(self.scheme, len(wide), stored), wide).lower


def _grid_of(tensors: Mapping[str, Value]) -> dict[str, Value]:
    return {name: tensors[name] for name in ("scale", "zero") if name in tensors}


@dataclass(frozen=True)
class StoredLayer:
    """The units of a layer at the widest width, in a file.

    Attributes:
        shard: layout of the file.
        schemes: unit name -> scheme, of these units at least.
    """

    shard: Shard
    schemes: Mapping[str, Scheme]

    def values(self, folder: Path) -> Callable[[str, tuple[int, int]], Tensor]:
        """A function from the name and [out, in] shape of a unit to its weights, float32.

        Args:
            folder: that holds the file.
        """
        tensors = self.shard.mapped(folder)

        def of(name: str, shape: tuple[int, int]) -> Tensor:
            scheme = self.schemes[name]
            return scheme.storage.decode(scheme, shape, scheme.among(tensors, name, shape))

        return of


def at_width(scheme: Scheme, width: int) -> Scheme:
    """How a unit is stored alone at a narrower width.

    >>> at_width(Scheme(width=8), 4).width, at_width(Scheme(width=16), 4).width
    (4, 16)
    """
    return scheme if scheme.is_unquantized else scheme.model_copy(update={"width": width})


def nested_shards(width: int, layers: int, units: Mapping[str, tuple[int, tuple[int, int], Scheme]]) -> list[Shard]:
    """The file of each layer for a narrower width; those of the widest are `moqa.format.layout.shards`.

    >>> [shard.file for shard in nested_shards(4, 1, {})]
    ['width-4-00002-of-00002.safetensors']

    Args:
        width: the narrower one.
        layers: decoder layers of the model.
        units: unit name -> layer, [out, in] shape and scheme at the widest width.
    """
    stored = {
        name: (layer, shape, Rounding(at_width(scheme, width)))
        for name, (layer, shape, scheme) in units.items()
        if not scheme.is_unquantized
    }
    return shards({}, layers, stored, f"width-{width}")[1:]
