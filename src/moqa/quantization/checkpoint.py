"""Writing the files of a checkpoint: one shard for tensors that are kept, one per block, then the manifest."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from moqa import __version__
from moqa.errors import MoqaError
from moqa.format.layout import Shard, shards
from moqa.format.manifest import (
    MANIFEST,
    Candidates,
    Manifest,
    NarrowUnit,
    NarrowWidth,
    StoredFile,
    StoredTensor,
    StoredUnit,
    format_of,
)
from moqa.format.nested import Rounding, StoredLayer, at_width, nested_shards
from moqa.format.scheme import Scheme
from moqa.format.writer import write_index, write_manifest, write_shard
from moqa.methods import Method
from moqa.models.view import ModelView
from moqa.planning import Plan
from moqa.planning.account import kept_entries
from moqa.profiling import Profile
from moqa.quantization.card import write_card
from moqa.quantization.layer import QuantizedUnit
from moqa.storage.resumable import ResumableRun


class UnitWriter:
    """Writes the units of a checkpoint at one width into the result of a run, a file for each layer.

    Args:
        view: the original.
        work: the run.
        layout: file of each layer.
        schemes: unit name -> scheme.
        wide: of a narrower width: the units at the widest one, which are written before.
        name: that distinguishes its steps from those of other widths.

    Attributes:
        layout: as given, like the others.
    """

    def __init__(
        self, view: ModelView, work: ResumableRun, layout: Sequence[Shard], schemes: Mapping[str, Scheme],
        wide: "UnitWriter | None" = None, name: str = "",
    ) -> None:  # fmt: skip
        self._view, self._work, self.layout, self.schemes, self.wide, self.name = (
            view, work, layout, schemes, wide, name,
        )  # fmt: skip

    def stored(self, layer: int) -> StoredLayer:
        """The units of a layer that is written."""
        names = (unit.name for unit in self._view.block_units(layer))
        return StoredLayer(self.layout[layer], {name: self.schemes[name] for name in names})

    def missing(self) -> list[int]:
        """Indices of the layers that are not written yet."""
        return [layer for layer in range(len(self.layout)) if self._work.done(self._step(layer)) is None]

    def write_layer(self, layer: int, done: Mapping[str, QuantizedUnit]) -> dict[str, Any]:
        """Write a quantized layer; returns what `mark_done` records of it."""
        tensors = stored_tensors(done) if self.wide is None else self._rounded(layer, done)
        file = write_shard(self._work.result, self.layout[layer], tensors)
        stored = {
            unit.name: StoredUnit(
                layer=layer, role=unit.role, shape=unit.shape, scheme=self.schemes[unit.name],
                method=done[unit.name].method, error=_rounded(done[unit.name].error),
            ).model_dump(mode="json")
            for unit in self._view.block_units(layer)
        }  # fmt: skip
        return {"file": file.model_dump(mode="json"), "units": stored}

    def mark_done(self, layer: int, written: Mapping[str, Any]) -> None:
        """Record that a layer is done."""
        # the hash of a shard is made while it is written
        self._work.mark_done(self._step(layer), written, {self.layout[layer].file: written["file"]["sha256"]})

    def written(self) -> tuple[dict[str, StoredUnit], dict[str, StoredFile]]:
        """All units and files.

        Raises:
            MoqaError: if a file has changed since it was written.
        """
        files: dict[str, StoredFile] = {}
        units: dict[str, StoredUnit] = {}
        for layer, shard in enumerate(self.layout):
            done = self._work.done(self._step(layer))
            assert done is not None
            files[shard.file] = unchanged(self._work, shard, done)
            units |= {name: StoredUnit.model_validate(unit) for name, unit in done["units"].items()}
        return units, files

    def _rounded(self, layer: int, done: Mapping[str, QuantizedUnit]) -> dict[str, Tensor]:
        """The tensors of a layer of a narrower width by their names in its shard."""
        assert self.wide is not None
        found, values = dict[str, Tensor](), self.wide.stored(layer).values(self._work.result)
        for unit in self._view.block_units(layer):
            scheme = self.schemes[unit.name]
            if not scheme.is_unquantized:
                stored = Rounding(scheme).store(unit.shape, done[unit.name].tensors, values(unit.name, unit.shape))
                found |= {f"{unit.name}.{suffix}": tensor for suffix, tensor in stored.items()}
        return found

    def _step(self, layer: int) -> str:
        return f"{self.name}layer-{layer}"


class CheckpointWriter:
    """Writes a checkpoint into the result of a run, shard by shard.

    Args:
        view: the original.
        work: the run.
        plan: scheme of every unit.
        profile: that the plan was made from.
        method: how units are quantized.
        nested: narrower widths.

    Attributes:
        depth: number of layers.
        widths: writers of the units: of the plan's width, then of the narrower ones.
    """

    def __init__(
        self, view: ModelView, work: ResumableRun, plan: Plan, profile: Profile, method: Method, nested: Sequence[int]
    ) -> None:  # fmt: skip
        self._view, self._work, self._plan, self._profile, self._method = view, work, plan, profile, method
        self._kept, self.depth = kept_entries(profile), len(view.blocks)
        units = units_of(view, plan)
        self._layout, *layout = shards(self._kept, self.depth, units)
        wide = UnitWriter(view, work, layout, plan.units)
        self._nested = {
            width: UnitWriter(
                view, work, nested_shards(width, self.depth, units),
                {name: at_width(scheme, width) for name, scheme in plan.units.items()}, wide, f"width-{width}-",
            )
            for width in nested
        }  # fmt: skip
        self.widths = (wide, *self._nested.values())

    def write_kept(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors that are not units, and record that it is done."""
        file = write_shard(self._work.result, self._layout, tensors)
        self._work.mark_done("kept", {"file": file.model_dump(mode="json")}, {self._layout.file: file.sha256})

    def finish(self, model: str) -> None:
        """Check all files and write the manifest.

        Args:
            model: the original as the user gave it.

        Raises:
            MoqaError: if a file has changed since it was written.
        """
        work, plan, profile = self._work, self._plan, self._profile
        kept = work.done("kept")
        assert kept is not None
        units, files = self.widths[0].written()
        files = {self._layout.file: unchanged(work, self._layout, kept), **files}
        written = sum(file.bytes for file in files.values())
        if written != plan.account.checkpoint:
            raise RuntimeError(f"wrote {written} bytes, planned {plan.account.checkpoint}")
        records = profile.record.distributions.items()
        manifest = Manifest(
            format=format_of(plan.units.values(), bool(self._nested)),
            moqa=__version__, model=model, model_type=plan.model_type, fingerprint=plan.fingerprint,
            layers=self.depth, strategy=plan.strategy, options=plan.options.model_dump(), ties=plan.ties,
            budget=plan.budget, method=self._method.name,
            **{name: getattr(plan, name) for name in Candidates.model_fields},
            seed=profile.record.settings.seed, mixture=plan.mixture,
            fitted={
                name: record.fitted
                for name, record in records
                if name in plan.known and record.fitted is not None
            },
            units=units, files=files, left_out=self._view.left_out(),
            nested={width: _narrow(*writer.written()) for width, writer in self._nested.items()},
            kept={
                name: StoredTensor(dtype=str(dtype).removeprefix("torch."), shape=shape)
                for name, (dtype, shape) in self._kept.items()
            },
        )  # fmt: skip
        write_index(manifest, work.result)
        assert self._view.folder is not None
        write_card(work.result, manifest, self._view.folder)
        write_manifest(manifest, work.result / MANIFEST)


def stored_tensors(done: Mapping[str, QuantizedUnit]) -> dict[str, Tensor]:
    """The tensors of some units by their names in a shard."""
    return {f"{name}.{suffix}": tensor for name, result in done.items() for suffix, tensor in result.tensors.items()}


def unchanged(work: ResumableRun, shard: Shard, done: Mapping[str, Any]) -> StoredFile:
    """What was recorded of a file of the result when it was written.

    Raises:
        MoqaError: if it has another length by now.
    """
    file, path = StoredFile.model_validate(done["file"]), work.result / shard.file
    if not path.is_file() or path.stat().st_size != file.bytes:
        raise MoqaError(f"{path} was changed after it was written", "start again with --restart")
    return file


def units_of(view: ModelView, plan: Plan) -> dict[str, tuple[int, tuple[int, int], Scheme]]:
    """Unit name -> layer, shape and scheme.

    >>> units_of(view, plan)["model.layers.0.self_attn.q_proj"][:2]
    (0, (256, 256))
    """
    return {name: (unit.layer, unit.shape, plan.units[name]) for name, unit in view.units.items()}


def _narrow(units: Mapping[str, StoredUnit], files: dict[str, StoredFile]) -> NarrowWidth:
    quantized = {name: unit for name, unit in units.items() if not unit.scheme.is_unquantized}
    return NarrowWidth(
        units={name: NarrowUnit(method=unit.method, error=unit.error) for name, unit in quantized.items()}, files=files
    )


def _rounded(error: float | None) -> float | None:
    return None if error is None else float(f"{error:.6g}")
