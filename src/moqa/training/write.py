"""Write a checkpoint that was trained: the files of the one before, with other tensors in them."""

import shutil
from pathlib import Path

from moqa.format.cache import FOLDER as CACHE
from moqa.format.cache import has_cache
from moqa.format.manifest import MANIFEST, Recovery
from moqa.format.reader import Checkpoint
from moqa.format.writer import write_manifest, write_shard
from moqa.planning import PLAN, for_file, read_plan
from moqa.quantization.card import write_card
from moqa.storage.artifact import write_sealed
from moqa.training.student import Student


def write_trained(packed: Checkpoint, student: Student | None, out: Path, recovery: Recovery, original: Path) -> None:
    """Write the files of a checkpoint that was trained; they have the same lengths as before.

    Args:
        packed: the checkpoint before.
        student: holds what changed; None writes what was stored before.
        out: folder to write to.
        recovery: what the manifest says of the training.
        original: folder of the original.
    """
    manifest, files = packed.manifest, dict(packed.manifest.files)
    for name in (manifest.companions or {}).keys() - {PLAN}:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(packed.folder / name, out / name)
    if has_cache(packed.folder):
        shutil.copytree(packed.folder / CACHE, out / CACHE, dirs_exist_ok=True)
    source = packed.layer if student is None else student.stored
    for block, shard in zip((None, *range(manifest.layers)), packed.shards, strict=True):
        files[shard.file] = write_shard(out, shard, source(block))
    trained = manifest.model_copy(update={"files": files, "recovery": recovery})
    write_card(out, trained, original)
    write_manifest(trained, out / MANIFEST)
    # the manifest does not cover it: a checkpoint needs no plan
    if (packed.folder / PLAN).is_file():
        write_sealed(for_file(read_plan(packed.folder / PLAN), out / PLAN), out / PLAN)
