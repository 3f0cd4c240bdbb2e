"""Writing the files of a checkpoint: one shard for tensors that are kept, one per block, then the manifest."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moqa import __version__
from moqa.errors import MoqaError
from moqa.format.layout import Shard, shards
from moqa.format.manifest import FORMAT, MANIFEST, Candidates, Manifest, StoredFile, StoredTensor, StoredUnit
from moqa.format.writer import write_index, write_manifest, write_shard
from moqa.methods import Method
from moqa.models.view import ModelView
from moqa.planning import Plan
from moqa.planning.account import kept_entries
from moqa.profiling import Profile
from moqa.quantization.card import write_card
from moqa.quantization.layer import QuantizedUnit
from moqa.storage.resumable import ResumableRun


class CheckpointWriter:
    """Writes a checkpoint into the result of a run, shard by shard.

    Args:
        view: the original.
        work: the run.
        plan: scheme of every unit.
        profile: that the plan was made from.
        method: how units are quantized.

    Attributes:
        depth: number of layers.
    """

    def __init__(self, view: ModelView, work: ResumableRun, plan: Plan, profile: Profile, method: Method) -> None:
        self._view, self._work, self._plan, self._profile, self._method = view, work, plan, profile, method
        self._kept, self.depth = kept_entries(profile), len(view.blocks)
        units = {name: (unit.layer, unit.shape, plan.units[name]) for name, unit in view.units.items()}
        self._layout = shards(self._kept, self.depth, units)

    def missing(self) -> list[int]:
        """Indices of the layers that are not written yet."""
        return [layer for layer in range(self.depth) if self._work.done(_step(layer)) is None]

    def write_kept(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors that are not units, and record that it is done."""
        file = write_shard(self._work.result, self._layout[0], tensors)
        self._mark_done("kept", {"file": file.model_dump(mode="json"), "units": {}}, self._layout[0])

    def write_layer(self, layer: int, done: Mapping[str, QuantizedUnit]) -> dict[str, Any]:
        """Write a quantized layer; returns what `mark_done` records of it."""
        file = write_shard(self._work.result, self._layout[layer + 1], stored_tensors(done))
        stored = {
            unit.name: StoredUnit(
                layer=layer, role=unit.role, shape=unit.shape, scheme=self._plan.units[unit.name],
                method=done[unit.name].method, error=_rounded(done[unit.name].error),
            ).model_dump(mode="json")
            for unit in self._view.block_units(layer)
        }  # fmt: skip
        return {"file": file.model_dump(mode="json"), "units": stored}

    def mark_done(self, layer: int, written: Mapping[str, Any]) -> None:
        """Record that a layer is done."""
        self._mark_done(_step(layer), written, self._layout[layer + 1])

    def _mark_done(self, step: str, written: Mapping[str, Any], shard: Shard) -> None:
        # the hash of a shard is made while it is written
        self._work.mark_done(step, written, {shard.file: written["file"]["sha256"]})

    def finish(self, model: str) -> None:
        """Check all files and write the manifest.

        Args:
            model: the original as the user gave it.

        Raises:
            MoqaError: if a file has changed since it was written.
        """
        work, plan, profile = self._work, self._plan, self._profile
        files: dict[str, StoredFile] = {}
        units: dict[str, StoredUnit] = {}
        for shard, step in zip(self._layout, ("kept", *map(_step, range(self.depth))), strict=True):
            done = work.done(step)
            assert done is not None
            files[shard.file] = StoredFile.model_validate(done["file"])
            units |= {name: StoredUnit.model_validate(unit) for name, unit in done["units"].items()}
        written = sum(file.bytes for file in files.values())
        if written != plan.account.checkpoint:
            raise RuntimeError(f"wrote {written} bytes, planned {plan.account.checkpoint}")
        for name, file in files.items():
            if not (work.result / name).is_file() or (work.result / name).stat().st_size != file.bytes:
                raise MoqaError(f"{work.result / name} was changed after it was written", "start again with --restart")
        records = profile.record.distributions.items()
        manifest = Manifest(
            format=FORMAT if any(scheme.is_coded for scheme in plan.units.values()) else 1,
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


def _step(layer: int) -> str:
    return f"layer-{layer}"


def _rounded(error: float | None) -> float | None:
    return None if error is None else float(f"{error:.6g}")
