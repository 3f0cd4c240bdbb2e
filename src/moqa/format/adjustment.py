"""An adjustment on disk: a record, and one file of channels and units with bits of their own."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from moqa.errors import MoqaError
from moqa.format.layout import Entry, Shard, aligned, entry_bytes
from moqa.format.manifest import Fitted, Length, Side, StoredFile
from moqa.format.reader import Checkpoint
from moqa.format.scheme import Scheme
from moqa.format.tiles import TILE
from moqa.format.writer import write_shard
from moqa.storage.artifact import check_format, check_signed, checksum, file_hash, read_json, signed, write_json
from moqa.storage.resumable import resumable, tidy

FORMAT = 1
RECORD, WEIGHTS = "adjustment.json", "adjustment.safetensors"
ROWS, COLUMNS = ("gate_proj", "up_proj"), "down_proj"
GRID = ("scale", "zero")
# zero-point of columns: the stored byte that is closest to the middle of their grid
MIDDLE = 127


class ChannelPart(BaseModel, frozen=True):
    """Rows of one projection, or columns of `down_proj`, of experts of all layers, stored in one scheme."""

    projection: Literal["gate_proj", "up_proj", "down_proj"]
    scheme: Scheme
    replaces: bool = Field(description="whether they replace the packed ones; otherwise they are added to them")
    counts: tuple[Length, ...] = Field(description="channels of each decoder layer")

    def bytes(self, sizes: "ExpertSizes") -> int:
        """Bytes of its matrices: what each layer stores, padded to whole tiles."""
        return sum(entry_bytes(entry) for n in self.counts for entry in self.stored(n, sizes).values())

    def stored(self, count: int, sizes: "ExpertSizes") -> dict[str, Entry]:
        """Dtype and shape of the stored tensors of a layer's matrix, by suffix.

        Columns have factors of their own and share one constant grid, which is not stored.
        """
        entries = self.scheme.tensors(self.shape(count, sizes)) if count else {}
        constant = GRID if self.projection == COLUMNS else ()
        return {suffix: entry for suffix, entry in entries.items() if suffix not in constant}

    def shape(self, count: int, sizes: "ExpertSizes") -> tuple[int, int]:
        """(out, in) of a layer's matrix."""
        return (sizes.hidden, count) if self.projection == COLUMNS else (count, sizes.hidden)


class ExpertSizes(BaseModel, frozen=True):
    """What all layers of experts have in common."""

    experts: Side
    hidden: Side
    width: Side = Field(le=2**15, description="channels of an expert")


class Replaced(BaseModel, frozen=True):
    """A unit that replaces the checkpoint's."""

    shape: tuple[Side, Side]
    scheme: Scheme


class AdjustmentRecord(BaseModel, frozen=True):
    """The content of `adjustment.json`."""

    format: int = FORMAT
    moqa: str = Field(description="version that wrote it")
    checkpoint: str = Field(description="checksum of the manifest of the checkpoint that it fits")
    name: str = Field(description="the novel distribution")
    mode: str
    rule: str = Field(description="by which the channels were chosen")
    budget: float = Field(description="bytes it may add, as a share of the checkpoint's")
    samples: int
    tokens: int
    seed: int
    expected: float = Field(description="expected decrease of the KL divergence on the samples, nats per token")
    fitted: dict[str, Fitted] = Field(description="texts that it was fitted on")
    sizes: ExpertSizes
    channels: tuple[ChannelPart, ...]
    units: dict[str, Replaced]
    extra_bytes: int = Field(description="growth of the weights in use: its own bytes less those that it replaces")
    weights: StoredFile
    checksum: str = ""

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if len({len(part.counts) for part in self.channels}) > 1:
            raise ValueError("its parts count the channels of different numbers of layers")
        for part in self.channels:
            # kernels multiply columns, whose factors are their own, as one group
            most = part.scheme.group_size if part.projection == COLUMNS and not part.scheme.is_unquantized else math.inf
            if max(part.counts, default=0) > most:
                raise ValueError(f"{max(part.counts)} columns in groups of {most}")
        return self

    def shard(self) -> Shard:
        """Layout of the weight file."""
        return layout(self.sizes, self.channels, self.units)


def layout(sizes: ExpertSizes, channels: tuple[ChannelPart, ...], units: Mapping[str, Replaced]) -> Shard:
    """Layout of an adjustment's weight file.

    >>> rows = ChannelPart(projection="up_proj", scheme=Scheme(width=2), replaces=False, counts=(16, 0))
    >>> list(layout(ExpertSizes(experts=8, hidden=64, width=32), (rows,), {}).entries)
    ['factor', 'experts', 'channel', 'matrices']
    """
    # few tensors, since each has an entry in the header: their contents follow from the record
    entries: dict[str, Entry] = {}
    if channels:
        total = sum(sum(part.counts) for part in channels)
        columns = sum(sum(part.counts) for part in channels if part.projection == COLUMNS)
        entries["experts"] = (torch.int16, (len(channels), len(channels[0].counts), sizes.experts))
        entries["channel"] = (index_dtype(sizes), (total,))
        entries["factor"] = (torch.bfloat16, (columns,))
        entries["matrices"] = (torch.uint8, (sum(part.bytes(sizes) for part in channels),))
    for name, unit in units.items():
        entries |= {f"{name}.{suffix}": entry for suffix, entry in unit.scheme.tensors(unit.shape).items()}
    return Shard(WEIGHTS, aligned(entries))


def index_dtype(sizes: ExpertSizes) -> torch.dtype:
    """The smallest of two integer types that can number an expert's channels."""
    return torch.uint8 if sizes.width <= 2**8 else torch.int16


@cache
def column_grid(hidden: int) -> dict[str, Tensor]:
    """Scales of 1 and zero-points in the middle, which all matrices of columns share."""
    shape = (-(-hidden // TILE), 1, TILE)
    return {"scale": torch.ones(shape, dtype=torch.bfloat16), "zero": torch.full(shape, MIDDLE, dtype=torch.uint8)}


@dataclass(frozen=True)
class LayerChannels:
    """One layer's part of `ChannelPart`, mapped from the file.

    Attributes:
        part: which channels these are, and how they are stored.
        shape: (out, in) of the matrix.
        tensors: of the matrix, by suffix.
        expert: [channels] int64.
        channel: [channels] int64.
        factor: [channels] float32; None for rows.
    """

    part: ChannelPart
    shape: tuple[int, int]
    tensors: dict[str, Tensor]
    expert: Tensor
    channel: Tensor
    factor: Tensor | None


@dataclass(frozen=True)
class Adjustment:
    """An adjustment that was read and checked.

    >>> adjustment = read_adjustment("runs/german")
    >>> adjustment.record.name, adjustment.record.mode
    ('german', 'residual')
    """

    folder: Path
    record: AdjustmentRecord

    @cached_property
    def _mapped(self) -> dict[str, Tensor]:
        return self.record.shard().mapped(self.folder)

    def unit(self, name: str) -> dict[str, Tensor]:
        """Tensors of a unit that replaces the checkpoint's, by suffix."""
        unit = self.record.units[name]
        return unit.scheme.among(self._mapped, name, unit.shape)

    def layer(self, layer: int) -> Iterator[LayerChannels]:
        """Its channels of one layer's experts."""
        sizes, begin, column = self.record.sizes, 0, 0
        for number, part in enumerate(self.record.channels):
            count, before = part.counts[layer], sum(part.counts[:layer])
            at = slice(begin + before, begin + before + count)
            columns = slice(column + before, column + before + count)
            begin += sum(part.counts)
            column += sum(part.counts) if part.projection == COLUMNS else 0
            if not count:
                continue
            yield LayerChannels(
                part, part.shape(count, sizes), self._matrix(number, layer),
                expert=torch.arange(sizes.experts).repeat_interleave(self._mapped["experts"][number, layer].long()),
                channel=self._mapped["channel"][at].long(),
                factor=self._mapped["factor"][columns].float() if part.projection == COLUMNS else None,
            )  # fmt: skip

    def _matrix(self, number: int, layer: int) -> dict[str, Tensor]:
        """Tensors of a part's matrix in a layer, by suffix."""
        parts, sizes, tensors = self.record.channels, self.record.sizes, {}
        part, begin = parts[number], sum(before.bytes(sizes) for before in parts[:number])
        begin += sum(entry_bytes(entry) for n in part.counts[:layer] for entry in part.stored(n, sizes).values())
        for suffix, entry in part.stored(part.counts[layer], sizes).items():
            end = begin + entry_bytes(entry)
            tensors[suffix] = self._mapped["matrices"][begin:end].view(entry[0]).view(entry[1])
            begin = end
        if part.projection == COLUMNS and not part.scheme.is_unquantized:
            tensors |= column_grid(sizes.hidden)
        return tensors

    def check_values(self) -> None:
        """Check that all channels exist and that all values are finite.

        Raises:
            MoqaError: naming the part.
        """
        sizes = self.record.sizes
        for number, part in enumerate(self.record.channels):
            counts = self._mapped["experts"][number]
            if counts.sum(1).tolist() != list(part.counts) or bool((counts < 0).any()):
                raise MoqaError(f"{self.folder}: the channels of part {number} do not match its counts per expert")
        for layer in range(len(self.record.channels[0].counts) if self.record.channels else 0):
            for channels in self.layer(layer):
                places = channels.expert * sizes.width + channels.channel
                inside = bool((channels.channel >= 0).all()) and bool((channels.channel < sizes.width).all())
                if not inside or not bool((places.diff() > 0).all()):
                    raise MoqaError(f"{self.folder}: layer {layer} has channels that do not exist or are not ascending")
                for suffix in channels.tensors.keys() & {"scale", "weight"}:
                    self._check_finite(f"a {suffix} of layer {layer}", channels.tensors[suffix])
                if channels.factor is not None:
                    self._check_finite(f"a factor of layer {layer}", channels.factor)
        for name in self.record.units:
            for suffix, tensor in self.unit(name).items():
                if suffix in ("scale", "weight"):
                    self._check_finite(f"{name}.{suffix}", tensor)

    def _check_finite(self, what: str, tensor: Tensor) -> None:
        if not bool(torch.isfinite(tensor.float()).all()):
            raise MoqaError(f"{self.folder}: {what} is NaN or infinite")


def write_adjustment(record: AdjustmentRecord, tensors: Mapping[str, Tensor], out: Path, overwrite: bool) -> Adjustment:
    """Write an adjustment, whole or not at all.

    Args:
        record: everything except `weights` and `checksum`, which are filled in.
        tensors: by their names in the layout.
        out: folder to create.
        overwrite: replace an adjustment that exists there.
    """
    job = {"adjustment": checksum(record.model_dump(mode="json"))}
    if tidy(out) == job:
        return read_adjustment(out)
    with resumable(out, job, overwrite, restart=True) as work:
        record = signed(record.model_copy(update={"weights": write_shard(work.result, record.shard(), tensors)}))
        write_json(record, work.result / RECORD)
    return Adjustment(out, record)


def read_adjustment(folder: str | Path) -> Adjustment:
    """Read an adjustment and check all of it.

    >>> read_adjustment("runs/german").record.checkpoint == checkpoint.manifest.checksum
    True

    Raises:
        MoqaError: if it is not an adjustment, has a newer format, or is truncated or changed.
    """
    folder = Path(folder)
    record = read_json(AdjustmentRecord, folder / RECORD)
    check_format(f"{folder} has adjustment", record.format, FORMAT)
    check_signed(folder / RECORD, record.checksum)
    path, shard = folder / WEIGHTS, record.shard()
    if not path.is_file():
        raise MoqaError(f"{folder} lacks {WEIGHTS}")
    if path.stat().st_size != shard.bytes:
        raise MoqaError(f"{path} has {path.stat().st_size} bytes", f"{shard.bytes} were written")
    if file_hash(path) != record.weights.sha256:
        raise MoqaError(f"{path} is corrupted", f"its sha256 differs from that in {RECORD}")
    adjustment = Adjustment(folder, record)
    adjustment.check_values()
    return adjustment


def sizes_of(packed: Checkpoint) -> ExpertSizes:
    """The sizes that all layers of experts of a checkpoint share.

    >>> sizes_of(checkpoint).experts
    16

    Raises:
        MoqaError: if it has no routed experts, or layers of different sizes.
    """
    sizes = set()
    for layer in range(packed.manifest.layers):
        units = [(n, u) for n, u in packed.manifest.units.items() if u.layer == layer and u.role == "expert"]
        shapes = {unit.shape for name, unit in units if name.endswith("down_proj")}
        sizes |= {(len(units) // 3, *shape) for shape in shapes}
    if not sizes:
        raise MoqaError(
            f"{packed.folder} has no routed experts", "adjustments need some: they give bits to their channels"
        )
    if len(sizes) > 1:
        raise MoqaError(f"{packed.folder} has layers of experts of different sizes", "adjustments need one size")
    experts, hidden, width = sizes.pop()
    return ExpertSizes(experts=experts, hidden=hidden, width=width)


def check_fits(adjustment: Adjustment, packed: Checkpoint) -> None:
    """Refuse an adjustment that was made for another checkpoint, or says so but does not fit its tensors.

    >>> check_fits(read_adjustment("runs/german"), checkpoint)

    Raises:
        MoqaError: naming the difference.
    """
    record, manifest, folder = adjustment.record, packed.manifest, adjustment.folder
    if record.checkpoint != manifest.checksum:
        raise MoqaError(
            f"{folder} was made for another checkpoint ({record.checkpoint[:8]})",
            f"{packed.folder} is {manifest.checksum[:8]}",
        )
    if record.sizes != sizes_of(packed):
        raise MoqaError(f"{folder} is for experts of {record.sizes}", f"{packed.folder} has {sizes_of(packed)}")
    experts = {name: unit for name, unit in manifest.units.items() if unit.role == "expert"}
    layers = {unit.layer for unit in experts.values()}
    for part in record.channels:
        if len(part.counts) != manifest.layers or any(
            part.counts[n] for n in range(manifest.layers) if n not in layers
        ):
            raise MoqaError(
                f"{folder} has channels in other layers", f"{packed.folder} has experts in {sorted(layers)}"
            )
    for name, unit in record.units.items():
        if name not in experts or experts[name].shape != unit.shape:
            raise MoqaError(f"{folder} replaces {name} {unit.shape}", f"{packed.folder} has no such unit of an expert")
