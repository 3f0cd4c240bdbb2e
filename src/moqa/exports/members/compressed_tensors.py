"""`compressed-tensors`: a checkpoint of symmetric integers in the format of vLLM and transformers, bit for bit."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from moqa import __version__
from moqa.errors import MoqaError
from moqa.exports.registry import ExportJob, exports
from moqa.format.manifest import CONFIG, StoredUnit
from moqa.format.planes import unpack, untile_rows
from moqa.format.reader import Checkpoint, is_checkpoint, open_checkpoint
from moqa.format.scheme import DEFAULT_ENCODING, Scheme
from moqa.format.tiles import PLANES
from moqa.models.load import read_config, stored_shapes
from moqa.originals.hub import INDEX, on_disk
from moqa.planning import ENGINES, PLAN
from moqa.storage.artifact import write_json
from moqa.storage.folders import EXPORT, check_free
from moqa.storage.resumable import check_space, resumable

_WORD, _SLACK = 32, 2**20
_EXPERT, _LAYER = re.compile(r"(\bexperts\\\.)\d+"), re.compile(r"(\blayers\\\.)\d+")
# files of a checkpoint that belong to its own format alone
_OWN = {"moqa.json", "routing.json", "README.md", PLAN, CONFIG, INDEX}


@exports("compressed-tensors")
def compressed_tensors(job: ExportJob) -> list[str]:
    """Write the same integers and scales as int32 words, with the original's names and one group for each scheme."""
    folder = on_disk(job.source)
    if not is_checkpoint(folder):
        raise MoqaError(f"{job.source} is no checkpoint", "quantize a plan of --engine vllm, and give its folder")
    packed = open_checkpoint(folder, width=job.width)
    units = packed.manifest.units
    for name, unit in units.items():
        _check(name, unit, packed)
    _check_names(packed)
    config = _config(packed)
    check_free(job.out, job.overwrite)
    check_space(job.out, packed.bytes + _SLACK)
    facts = {"moqa": __version__, "to": "compressed-tensors", "checkpoint": packed.manifest.checksum}
    with resumable(job.out, facts, job.overwrite, job.restart) as work:
        files: dict[str, str] = {}
        for number, shard in enumerate(packed.shards):
            job.report("export", number, len(packed.shards))
            tensors = _tensors(packed, number - 1)
            save_file(tensors, work.result / shard.file, {"format": "pt"})
            (work.result / shard.file).chmod(0o644)
            files |= dict.fromkeys(tensors, shard.file)
        write_json({"metadata": {}, "weight_map": files}, work.result / INDEX)
        for name in (packed.manifest.companions or {}).keys() - _OWN:
            (work.result / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, work.result / name)
        write_json(config, work.result / CONFIG)
        write_json(facts, work.result / EXPORT)
        job.report("export", len(packed.shards), len(packed.shards))
    return _remarks(units)


def _check(name: str, unit: StoredUnit, packed: Checkpoint) -> None:
    """Refuse a unit that the format cannot store."""
    scheme, runs = unit.scheme, ENGINES["vllm"]
    if not scheme.is_unquantized and not (
        scheme.encoding == DEFAULT_ENCODING and scheme.symmetric and runs.holds(scheme, unit.shape)
        and scheme.width in {one.width for one in runs.candidates((4, 8), None, None, mixed=True)}
    ):  # fmt: skip
        how = "with zero-points" if scheme.encoding == DEFAULT_ENCODING and not scheme.symmetric else ""
        raise MoqaError(
            f"{packed.folder} stores {name} as {scheme.encoding} of {scheme.width} bits {how}".rstrip(),
            "plan with moqa plan PROFILE --engine vllm, quantize by that plan, and export the result",
        )


def _check_names(packed: Checkpoint) -> None:
    """Refuse a family whose names on disk are not those of its modules."""
    config = read_config(packed.folder, packed=True)
    there = stored_shapes(config)
    missing = next((name for name in packed.manifest.units if f"{name}.weight" not in there), None)
    if missing is not None:
        raise MoqaError(
            f"{config.model_type} stores {missing} under another name", "such families cannot be exported yet"
        )


def _tensors(packed: Checkpoint, layer: int) -> dict[str, Tensor]:
    """The tensors of a file: those that are kept, for layer -1, or the units of a layer."""
    if layer < 0:
        return {name: tensor.contiguous() for name, tensor in packed.layer(None).items()}
    stored, found = packed.layer(layer), dict[str, Tensor]()
    for name, unit in packed.manifest.units.items():
        if unit.layer == layer:
            words = _words(unit, unit.scheme.among(stored, name, unit.shape))
            found |= {f"{name}.{suffix}": tensor for suffix, tensor in words.items()}
    return found


def _words(unit: StoredUnit, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A unit's integers in words of 32 bits, the first in the lowest bits, and its scales."""
    width, (out, features) = unit.scheme.width, unit.shape
    if unit.scheme.is_unquantized:
        return {"weight": stored["weight"].contiguous()}
    integers = unpack([stored[f"p{index}"] for index in range(len(PLANES[width]))], width, unit.shape)
    each = _WORD // width
    fields = pad(integers.long(), (0, -features % each)).unflatten(1, (-1, each))
    words = (fields << (torch.arange(each) * width)).sum(-1)
    return {
        "weight_packed": words.to(torch.uint32).view(torch.int32).contiguous(),
        "weight_scale": untile_rows(stored["scale"], out).contiguous(),
        "weight_shape": torch.tensor([out, features]),
    }


def _config(packed: Checkpoint) -> dict[str, Any]:
    """`config.json`, with a group of units for each scheme."""
    units, kept = packed.manifest.units, packed.manifest.kept
    groups: dict[Scheme, list[str]] = {}
    for name, unit in units.items():
        if not unit.scheme.is_unquantized:
            groups.setdefault(unit.scheme, []).append(name)
    plain = [name for name, unit in units.items() if unit.scheme.is_unquantized]
    linear = [name.removesuffix(".weight") for name, entry in kept.items() if len(entry.shape) == 2]
    config = json.loads((packed.folder / CONFIG).read_text(encoding="utf-8"))
    config.pop("transformers_weights", None)
    return config | {"quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": [*dict.fromkeys(["lm_head", *linear, *plain])],
        "config_groups": {
            f"group_{number}": {
                "targets": ["Linear"] if len(groups) == 1 else _targets(names, units),
                "weights": {
                    "num_bits": scheme.width, "type": "int", "symmetric": True, "strategy": "group",
                    "group_size": scheme.group_size, "dynamic": False,
                },
                "input_activations": None, "output_activations": None,
            }
            for number, (scheme, names) in enumerate(groups.items())
        },
    }}  # fmt: skip


def _targets(names: Sequence[str], units: Mapping[str, StoredUnit]) -> list[str]:
    """Regular expressions of some units' names: numbers that do not matter are left open."""
    mine, found = set(names), dict[str, None]()
    for name in names:
        layer = _opened(re.escape(name), _EXPERT)
        whole = _opened(layer, _LAYER)
        alike = {other for other in units if re.fullmatch(whole, other)}
        found["re:^" + (whole if alike <= mine else layer) + "$"] = None
    return list(found)


def _opened(name: str, number: re.Pattern) -> str:
    """A name as an expression, in which one of its numbers is any."""
    return number.sub(lambda found: found[1] + r"\d+", name)


def _remarks(units: Mapping[str, StoredUnit]) -> list[str]:
    kinds = {(unit.role == "expert", unit.scheme) for unit in units.values() if not unit.scheme.is_unquantized}
    if len(kinds) <= len({role for role, _ in kinds}):
        return []
    return ["layers differ in width or group: vLLM reads such files, transformers 5.23 one scheme for all experts"]
