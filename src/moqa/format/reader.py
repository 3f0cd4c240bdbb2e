"""Read a checkpoint: its manifest, and its tensors only after every file has been checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from moqa.errors import MoqaError
from moqa.format.layout import DTYPES, NAMED, Shard, shards
from moqa.format.manifest import CONFIG, FORMAT, MANIFEST, Manifest, NarrowWidth
from moqa.format.nested import Rounding, at_width, nested_shards
from moqa.format.scheme import DEFAULT_ENCODING, Scheme
from moqa.format.writer import stored_file
from moqa.originals.folder import read_header
from moqa.originals.hub import on_disk
from moqa.storage.artifact import check_format, check_signed, file_hash, read_json, signed


@dataclass(frozen=True)
class Checkpoint:
    """A quantized model on disk.

    >>> checkpoint = open_checkpoint("runs/out")
    >>> checkpoint.manifest.budget, round(checkpoint.bits_per_weight, 1)
    ('--bpw 3', 3.0)
    """

    folder: Path
    manifest: Manifest

    def __repr__(self) -> str:
        """One line; `manifest` has all units."""
        size = f"{self.bits_per_weight:.3f} bits per weight, {self.bytes} bytes"
        return f"<Checkpoint of {self.manifest.model} at {self.folder}: {size}, {len(self.manifest.units)} units>"

    @cached_property
    def shards(self) -> list[Shard]:
        """Layout of all weight files that the manifest describes."""
        kept = {name: (_dtype(name, t.dtype), t.shape) for name, t in self.manifest.kept.items()}
        return shards(kept, self.manifest.layers, _units(self.manifest))

    @cached_property
    def nested_shards(self) -> dict[int, list[Shard]]:
        """Layout of the files of each narrower width, one for each layer."""
        layers, units = self.manifest.layers, _units(self.manifest)
        return {width: nested_shards(width, layers, units) for width in self.manifest.nested}

    @property
    def nested_bytes(self) -> int:
        """Bytes of the files of all narrower widths."""
        return sum(file.bytes for width in self.manifest.nested.values() for file in width.files.values())

    @property
    def bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(file.bytes for file in self.manifest.files.values())

    @property
    def unit_weights(self) -> int:
        """Number of weights in units."""
        return sum(unit.shape[0] * unit.shape[1] for unit in self.manifest.units.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the units."""
        return sum(u.scheme.stored_bytes(u.shape) for u in self.manifest.units.values()) * 8 / self.unit_weights

    @property
    def model_bits_per_weight(self) -> float:
        """Stored bits per weight of the whole model."""
        kept = sum(math.prod(tensor.shape) for tensor in self.manifest.kept.values())
        return self.bytes * 8 / (self.unit_weights + kept)

    def layer(self, index: int | None) -> dict[str, Tensor]:
        """Tensors of one layer's units, or all tensors that are kept if `index` is None, mapped and not copied."""
        return self.shards[0 if index is None else index + 1].mapped(self.folder)

    def check_config(self) -> None:
        """Compare `config.json` with its recorded hash.

        Raises:
            MoqaError: if they differ.
        """
        path = self.folder / CONFIG
        try:
            # reading a pipe in its place would never end
            digest = file_hash(path) if path.is_file() else ""
        except OSError as error:
            raise MoqaError(f"{path} cannot be read", error.strerror or str(error)) from None
        if digest != self.manifest.config:
            raise MoqaError(f"{path} was changed after it was written", "its sha256 differs from the manifest's")

    def check_layout(self) -> None:
        """Check that the manifest lists just the weight files that its units need.

        Raises:
            MoqaError: naming the first thing that differs.
        """
        manifest = self.manifest
        if len(manifest.files) != manifest.layers + 1:
            raise MoqaError(
                f"{self.folder / MANIFEST} lists {len(manifest.files)} weight files",
                f"its {manifest.layers} layers need {manifest.layers + 1}",
            )
        for name, unit in manifest.units.items():
            if unit.layer >= manifest.layers:
                raise MoqaError(f"{MANIFEST}: {name} is in layer {unit.layer}", f"there are {manifest.layers} layers")
        if sorted(manifest.files) != sorted(shard.file for shard in self.shards):
            raise MoqaError(f"{self.folder / MANIFEST} lists other files than its units need")
        for width, narrow in manifest.nested.items():
            self._check_nested(width, narrow)

    def _check_nested(self, width: int, narrow: NarrowWidth) -> None:
        """Refuse a narrower width whose units or files are not those of the checkpoint."""
        units = {name: unit.scheme for name, unit in self.manifest.units.items() if not unit.scheme.is_unquantized}
        for name, scheme in units.items():
            if scheme.encoding != DEFAULT_ENCODING or scheme.width <= width or (scheme.symmetric and width == 1):
                raise MoqaError(f"{MANIFEST}: {name} cannot have {width} bits nested", f"it is stored as {scheme}")
        if narrow.units.keys() != units.keys():
            name = min(narrow.units.keys() ^ units.keys())
            raise MoqaError(f"{MANIFEST}: {name} is not the same at {width} bits", "units of all widths are the same")
        if sorted(narrow.files) != sorted(shard.file for shard in self.nested_shards[width]):
            raise MoqaError(f"{self.folder / MANIFEST} lists other files of {width} bits than its units need")

    def check_file(self, shard: Shard, verify: bool) -> None:
        """Compare a weight file with its layout: length, names, dtypes, shapes, offsets.

        Args:
            shard: the layout.
            verify: also compare the hash, which reads every byte.

        Raises:
            MoqaError: naming the first thing that differs.
        """
        path, recorded = self.folder / shard.file, self.manifest.weight_files[shard.file]
        if not path.is_file():
            raise MoqaError(f"{self.folder} lacks {shard.file}", f"{MANIFEST} lists {len(self.shards)} weight files")
        if path.stat().st_size != recorded.bytes or recorded.bytes != shard.bytes:
            raise MoqaError(f"{path} has {path.stat().st_size} bytes", f"{shard.bytes} were written")
        with path.open("rb") as file:
            # entries and offsets follow from the layout, so only one header is correct
            if file.read(len(shard.header())) != shard.header():
                raise MoqaError(f"{path} has a different header than was written", _difference(path, shard))
        if verify and stored_file(path) != recorded:
            raise MoqaError(f"{path} is corrupted", "its sha256 differs from the manifest's")

    def check_companion(self, name: str) -> None:
        """Compare a file beside the weights, such as the tokenizer's, with its recorded hash.

        Raises:
            MoqaError: if it is missing or differs.
        """
        path = self.folder / name
        if not path.is_file():
            raise MoqaError(f"{self.folder} lacks {name}", f"{MANIFEST} lists it")
        if self.manifest.companions is None or stored_file(path) != self.manifest.companions[name]:
            raise MoqaError(f"{path} was changed after it was written", "its sha256 differs from the manifest's")

    def check_values(self) -> None:
        """Check that no scale is NaN, infinite or negative.

        Raises:
            MoqaError: naming the tensor.
        """
        for index in range(self.manifest.layers):
            self.check_scales(self.layer(index))

    def check_files(self, verify: bool) -> None:
        """Check everything that its weights are read from; see `check_file` and `check_values`.

        Raises:
            MoqaError: naming the first thing that differs.
        """
        for shard in self.shards:
            self.check_file(shard, verify)
        self.check_values()

    def check_scales(self, tensors: Mapping[str, Tensor]) -> None:
        """Check that no scale among some tensors is NaN, infinite or negative.

        Raises:
            MoqaError: naming the tensor.
        """
        for name, scale in tensors.items():
            if not name.endswith(".scale"):
                continue
            if not bool(torch.isfinite(scale).all()) or bool((scale < 0).any()):
                raise MoqaError(f"{self.folder}: {name} holds NaN, infinite or negative scales")

    def at_width(self, width: int) -> "Checkpoint":
        """The checkpoint as it is used at one of its widths; of units with different widths, this is the widest.

        >>> open_checkpoint("runs/nested").at_width(4).bits_per_weight  # doctest: +SKIP
        4.375

        Raises:
            MoqaError: if it has no such width.
        """
        widest = {unit.scheme.width for unit in self.manifest.units.values() if not unit.scheme.is_unquantized}
        if width in self.manifest.nested:
            return NarrowCheckpoint.of(self, width)
        if widest == {width}:
            return self
        if not self.manifest.nested:
            raise MoqaError(f"{self.folder} has no nested widths", f"--width {width} needs some: leave it out")
        there = ", ".join(map(str, sorted(widest | self.manifest.nested.keys())))
        raise MoqaError(f"{self.folder} has no {width} bits", f"--width takes {there}")


@dataclass(frozen=True, repr=False)
class NarrowCheckpoint(Checkpoint):
    """A nested checkpoint at a narrower width: an ordinary one, whose units are made when they are asked for.

    Attributes:
        wide: the same at its widest width.
        width: of its units.
    """

    wide: Checkpoint
    width: int

    @classmethod
    def of(cls, wide: Checkpoint, width: int) -> "NarrowCheckpoint":
        """A checkpoint at one of `manifest.nested`."""
        narrow = wide.manifest.nested[width]
        units = {
            name: unit.model_copy(update={"scheme": at_width(unit.scheme, width), **dict(narrow.units.get(name, ()))})
            for name, unit in wide.manifest.units.items()
        }
        # of integers alone, as a checkpoint of this width is written
        alone = {
            "format": 1,
            "nested": {},
            "widths": (width,),
            "units": units,
            "files": wide.manifest.files | narrow.files,
        }
        return cls(wide.folder, signed(wide.manifest.model_copy(update=alone)), wide, width)

    @property
    def bytes(self) -> int:
        """Bytes of the files that it would have alone."""
        return sum(shard.bytes for shard in self.shards)

    def check_files(self, verify: bool) -> None:
        """See `Checkpoint`."""
        self.wide.check_files(verify)
        for shard in self.wide.nested_shards[self.width]:
            self.wide.check_file(shard, verify)
            self.check_scales(shard.mapped(self.folder))

    def layer(self, index: int | None) -> dict[str, Tensor]:
        """See `Checkpoint`; units are copies."""
        wide = self.wide.layer(index)
        if index is None:
            return wide
        stored, found = self.wide.nested_shards[self.width][index].mapped(self.folder), dict[str, Tensor]()
        for name, unit in self.manifest.units.items():
            if unit.layer != index:
                continue
            full, scheme = self.wide.manifest.units[name].scheme, Rounding(unit.scheme)
            tensors = full.among(wide, name, unit.shape)
            if not full.is_unquantized:
                bits = {suffix: stored[f"{name}.{suffix}"] for suffix in scheme.tensors(unit.shape)}
                tensors = scheme.alone(unit.shape, bits, full.storage.decode(full, unit.shape, tensors))
            found |= {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
        return found


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder holds a moqa checkpoint."""
    return (Path(folder) / MANIFEST).is_file()


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Read the manifest of a checkpoint; its files are not checked.

    Raises:
        MoqaError: as `open_checkpoint`, for the manifest.
    """
    folder = on_disk(folder)
    if not is_checkpoint(folder):
        raise MoqaError(f"{folder} is not a moqa checkpoint", f"it has no {MANIFEST}")
    manifest = read_json(Manifest, folder / MANIFEST)
    check_format(f"{folder} has", manifest.format, FORMAT)
    check_signed(folder / MANIFEST, manifest.checksum)
    return Checkpoint(folder, manifest)


def open_checkpoint(folder: str | Path, verify: bool = True, width: int | None = None) -> Checkpoint:
    """Open a checkpoint and check it.

    >>> open_checkpoint("runs/out").manifest.layers
    6

    Args:
        folder: of the checkpoint, or its Hub id.
        verify: also compare the hashes, which reads every byte.
        width: of a nested checkpoint; None means the widest.

    Raises:
        MoqaError: if it is not a checkpoint, has a newer format, does not match its manifest, or lacks the width.
    """
    checkpoint = read_checkpoint(folder)
    checkpoint.check_config()
    checkpoint.check_layout()
    if width is not None:
        checkpoint = checkpoint.at_width(width)
    checkpoint.check_files(verify)
    return checkpoint


def _units(manifest: Manifest) -> dict[str, tuple[int, tuple[int, int], Scheme]]:
    return {name: (unit.layer, unit.shape, unit.scheme) for name, unit in manifest.units.items()}


def _dtype(name: str, text: str) -> torch.dtype:
    if text not in NAMED:
        raise MoqaError(f"{MANIFEST}: {name} has dtype {text!r}", f"known dtypes are {', '.join(NAMED)}")
    return NAMED[text]


def _difference(path: Path, shard: Shard) -> str:
    """The first tensor whose description in a file differs from the layout."""
    try:
        header = read_header(path)
        found = {name: (entry.get("dtype"), entry.get("shape")) for name, entry in header.items()}
    except (TypeError, RecursionError):
        return "it cannot be read"
    wanted = {name: (DTYPES[dtype], list(shape)) for name, (dtype, shape) in shard.entries.items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            return f"{name} is {found.get(name)}, the manifest says {wanted.get(name)}"
    return "its tensors are at other offsets"
