"""What the cache holds of the original: errors of a layer's channels, or the whole original."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moqa.format.cache import Cache
from moqa.format.manifest import Manifest
from moqa.kernels import PackedMatrix
from moqa.models.experts import PROJECTIONS
from moqa.runtime.packed import PackedExperts


@dataclass(frozen=True)
class ExpertErrors:
    """Quantization errors of the cached channels of one expert.

    Attributes:
        channels: [channels] int64, ascending.
        missing: projection -> [channels, hidden] original minus stored weights, float32; columns of `down_proj` as
            rows.
    """

    channels: Tensor
    missing: dict[str, Tensor]


class LayerOriginals:
    """One layer of a checkpoint, with its cache.

    >>> from moqa.format.cache import open_cache
    >>> cache = open_cache("runs/out", checkpoint.manifest.fingerprint)
    >>> LayerOriginals(model, checkpoint.manifest, cache, 0).missing()[7].missing["up_proj"].shape
    torch.Size([256, 256])
    """

    def __init__(self, model: nn.Module, manifest: Manifest, cache: Cache, layer: int) -> None:
        self._units = {name: unit for name, unit in manifest.units.items() if unit.layer == layer}
        self.stored = cache.layer(layer)
        self._whole = cache.whole
        self.matrices: dict[str, PackedMatrix] = {name: matrix_of(model, name) for name in self._units}
        self.module = next((n.rsplit(".", 2)[0] for n, unit in self._units.items() if unit.role == "expert"), None)
        self.significance: Tensor | None = self.stored.get("significance")

    @property
    def experts(self) -> int:
        """Number of routed experts."""
        return sum(unit.role == "expert" for unit in self._units.values()) // len(PROJECTIONS)

    def name(self, expert: int, projection: str) -> str:
        """Name of an expert's unit."""
        return f"{self.module}.{expert}.{projection}"

    def original(self, name: str) -> Tensor:
        """[out, in] original weights of a unit, float32; only if the cache holds the whole original."""
        return self.stored[name].float()

    def missing(self) -> dict[int, ExpertErrors]:
        """Errors of every expert that has cached channels."""
        errors = {}
        for expert in range(self.experts):
            base = {p: self.matrices[self.name(expert, p)].dense() for p in PROJECTIONS}
            base["down_proj"] = base["down_proj"].T
            if self._whole:
                rows = {p: self.original(self.name(expert, p)) for p in PROJECTIONS}
                rows["down_proj"] = rows["down_proj"].T
                channels = torch.arange(len(rows["down_proj"]))
            else:
                mine = self.stored["channel"][:, 0] == expert
                channels = self.stored["channel"][mine, 1].long()
                rows = {p: self.stored[p][mine].float() for p in PROJECTIONS}
            if len(channels):
                errors[expert] = ExpertErrors(channels, {p: rows[p] - base[p][channels] for p in PROJECTIONS})
        return errors

    def packed_rows(self, projection: str, places: Tensor) -> Tensor:
        """[channels, hidden] packed weights of [channels, 2] (expert, channel); columns of `down_proj` as rows."""
        parts = []
        for expert in places[:, 0].unique().tolist():
            dense = self.matrices[self.name(expert, projection)].dense()
            dense = dense.T if projection == "down_proj" else dense
            parts.append(dense[places[places[:, 0] == expert, 1]])
        return torch.cat(parts)

    @contextmanager
    def as_original(self) -> Iterator[None]:
        """Inside this context, the layer computes with its original weights; only if the cache holds all of them."""
        for name, matrix in self.matrices.items():
            matrix.hold(self.original(name))
        try:
            yield
        finally:
            for matrix in self.matrices.values():
                matrix.release()


def matrix_of(model: nn.Module, unit: str) -> PackedMatrix:
    """The packed matrix of a unit in a loaded model."""
    try:
        matrix = model.get_submodule(f"{unit}.matrix")
    except AttributeError:
        module, expert, projection = unit.rsplit(".", 2)
        packed = model.get_submodule(module).moqa_weights
        assert isinstance(packed, PackedExperts)
        matrix = packed.matrix(int(expert), projection)
    assert isinstance(matrix, PackedMatrix)
    return matrix
