"""Write a checkpoint that was trained: the files of the one before, with other tensors in them."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from moqa.format.cache import FOLDER as CACHE
from moqa.format.cache import has_cache
from moqa.format.manifest import MANIFEST, Recovery, StoredFile
from moqa.format.reader import Checkpoint
from moqa.format.writer import introduce, write_manifest, write_shard
from moqa.planning import PLAN, for_file, read_plan
from moqa.quantization.card import write_card
from moqa.storage.artifact import write_sealed


class Trained(Protocol):
    """What was trained of a checkpoint."""

    def stored(self, block: int | None) -> Mapping[str, Tensor]:
        """Trained tensors of a block's units, or the kept ones if `block` is None, as a shard has them."""


def write_trained(packed: Checkpoint, trained: Trained | None, out: Path, recovery: Recovery, original: Path) -> None:
    """Write the files of a checkpoint that was trained; they have the same lengths as before.

    Args:
        packed: the checkpoint before.
        trained: what changed; None writes what was stored before.
        out: folder to write to.
        recovery: what the manifest says of the training.
        original: folder of the original.
    """
    write_copy(packed, out, original, recovery, trained)
    # the manifest does not cover it: a checkpoint needs no plan
    if (packed.folder / PLAN).is_file():
        write_sealed(for_file(read_plan(packed.folder / PLAN), out / PLAN), out / PLAN)


def write_copy(
    packed: Checkpoint, out: Path, original: Path, recovery: Recovery | None = None, trained: Trained | None = None,
    recipe: Mapping[str, object] | None = None,
) -> None:  # fmt: skip
    """Write the files of a checkpoint again; of nested widths, the one that it is used at becomes one of its own.

    Args:
        packed: the checkpoint.
        out: folder to write to.
        original: folder of the original, for the card.
        recovery: what the manifest says of a training.
        trained: what changed in it; None writes what is stored.
        recipe: what config.json says of how it was made; None means what it says now.
    """
    manifest, files = packed.manifest, dict[str, StoredFile]()
    for name in (manifest.companions or {}).keys() - {PLAN}:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(packed.folder / name, out / name)
    if recipe is not None:
        introduce(out, recipe)
    if has_cache(packed.folder):
        shutil.copytree(packed.folder / CACHE, out / CACHE, dirs_exist_ok=True)
    for block, shard in zip((None, *range(manifest.layers)), packed.shards, strict=True):
        changed = {} if trained is None else trained.stored(block)
        files[shard.file] = write_shard(out, shard, {**packed.layer(block), **changed})
    written = manifest.model_copy(update={"files": files, "recovery": recovery})
    write_card(out, written, original)
    write_manifest(written, out / MANIFEST)
