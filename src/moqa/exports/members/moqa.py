"""`moqa`: an ordinary checkpoint of one width, from one with nested widths."""

import json
from pathlib import Path

from moqa import __version__
from moqa.errors import MoqaError
from moqa.exports.registry import ExportJob, exports
from moqa.format.manifest import CONFIG
from moqa.format.reader import Checkpoint, is_checkpoint, open_checkpoint
from moqa.format.tiles import KEEP_WIDTH
from moqa.originals.hub import on_disk
from moqa.storage.files import read_text
from moqa.storage.folders import check_free
from moqa.storage.paths import found
from moqa.storage.resumable import check_space, resumable
from moqa.training.write import write_copy


@exports("moqa")
def moqa(job: ExportJob) -> list[str]:
    """Write what `--width` computes with as a checkpoint that every command and older versions take."""
    folder = on_disk(job.source)
    if not is_checkpoint(folder):
        raise MoqaError(f"{job.source} is no checkpoint", "moqa quantize --widths-nested 2,3,4,8 makes one")
    wide = open_checkpoint(folder)
    if job.width is None or not wide.manifest.nested:
        there = ", ".join(map(str, sorted(wide.manifest.nested))) or "no nested widths"
        raise MoqaError(f"{job.source} has {there}", "--to moqa needs one of its widths: --width 4")
    packed = wide.at_width(job.width)
    check_free(job.out, job.overwrite)
    check_space(job.out, packed.bytes)
    facts = {"moqa": __version__, "to": "moqa", "checkpoint": packed.manifest.checksum}
    original = Path(job.model or found(packed.manifest.model, folder))
    with resumable(job.out, facts, job.overwrite, job.restart) as work:
        job.report("export", 0, 1)
        write_copy(packed, work.result, original if original.is_dir() else folder, recipe=_recipe(packed, job.width))
        job.report("export", 1, 1)
    return []


def _recipe(packed: Checkpoint, width: int) -> dict[str, object]:
    """What config.json says of how the checkpoint was made, with the width that it has now."""
    said = json.loads(read_text(packed.folder / CONFIG)).get("quantization_config", {})
    kept = [KEEP_WIDTH] if any(unit.scheme.is_unquantized for unit in packed.manifest.units.values()) else []
    made = {name: value for name, value in said.items() if name != "quant_method"}
    return made | {"bits_per_weight": round(packed.bits_per_weight, 4), "widths": [width, *kept]}
