"""The model card of a checkpoint (`README.md`): what it was made from and how, and how to load it."""

import re
from pathlib import Path

import yaml

from moqa.format.manifest import CARD, Manifest, Recovery
from moqa.format.reader import Checkpoint
from moqa.storage.artifact import write_whole
from moqa.storage.files import read_text
from moqa.tasks import task_of
from moqa.tasks.configuration import read_configuration

# the licence is that of the original, as its own card says
_LICENCE = ("license", "license_name", "license_link")
_FRONT_CHARACTERS = 2**14  # the parser of YAML is slow
_FRONT = re.compile(r"---\r?\n(.*?)\r?\n---", re.DOTALL)
_RESULTS, _LOADING = "\n## On held-out text\n", "\n## Loading\n"
_PAGE = """
# {name}, {bits:.2f} bits per weight

{base} in mixed precision, made by moqa {moqa}: {size:.1f} MiB instead of 16 bits for each weight.

| made by | |
|---|---|
| strategy | {strategy} |
| budget | {budget} |
| method | {method} |
| trained afterwards | {trained} |
| units that share a width | {ties} |
| units of each width | {widths} |
| weights that share a scale | {groups} |
| fitted on | {mixture} |
| seed | {seed} |

```console
{commands}
```
{loading}
`pip install moqa`, then, with this folder or its id on the Hub:

{used_by}

## Licence
{licence}
"""


def write_card(folder: Path, manifest: Manifest, original: Path) -> None:
    """Write the card of a checkpoint.

    Args:
        folder: of the checkpoint.
        manifest: of the checkpoint.
        original: folder of the original, whose card may name its licence.
    """
    base, checkpoint = _hub_id(original), Checkpoint(folder, manifest)
    front: dict[str, object] = {"base_model": base, "base_model_relation": "quantized"} if base else {}
    stated = _licence(original / CARD)
    tags = ["moqa", "quantized", "mixed-precision"]
    front |= {"library_name": "transformers", "tags": tags, **stated}
    schemes = [unit.scheme for unit in manifest.units.values()]
    widths = {width: sum(s.width == width for s in schemes) for width in sorted({s.width for s in schemes})}
    groups = sorted({s.group_size for s in schemes if not s.is_unquantized})
    name = (base or manifest.model).rpartition("/")[2]
    copied = sorted(path.name for path in folder.iterdir() if path.name.startswith(("LICEN", "NOTICE")))
    named = str(stated.get("license_name", stated.get("license", "")))
    task = task_of(read_configuration(folder))
    recovery = manifest.recovery if manifest.recovery and manifest.recovery.kept else None
    how = {"strategy": manifest.strategy, "method": manifest.method, "ties": manifest.ties, "seed": manifest.seed}
    data = "".join(f" --data {name}={'FILE' if task.writes_samples else 'FOLDER'}" for name in manifest.fitted)
    commands = task.made_by.format(
        typed=base or name, budget=f"{manifest.budget} " if manifest.budget else "",
        data=_recovered(recovery) + data, **how,
    ) + _trained_by(recovery)  # fmt: skip
    page = _PAGE.format(
        name=name, bits=checkpoint.bits_per_weight, moqa=manifest.moqa, size=checkpoint.bytes / 2**20,
        base=f"[{base}](https://huggingface.co/{base})" if base else name, **how,
        budget=manifest.budget or "none", used_by=task.used_by,
        commands="\n".join(f"$ {line}" for line in commands.splitlines()),
        widths=", ".join(f"{count} of {width} bits" for width, count in widths.items()),
        groups=", ".join(map(str, groups)) or "-",
        mixture=", ".join(f"{share:.0%} {name}" for name, share in manifest.mixture.items()),
        trained="no" if recovery is None
        else f"{recovery.steps} steps{' of each block' if recovery.blockwise else ''}, on the same texts",
        loading=_LOADING,
        licence=f"That of the original{f': {named}' if named else ''}."
        + "".join(f" [{file}]({file})" for file in copied),
    )  # fmt: skip
    write_whole(folder / CARD, f"---\n{yaml.safe_dump(front)}---\n{page}")


def add_results(folder: Path, table: str) -> None:
    """Put a table of results into the card of a checkpoint, in place of an earlier one."""
    card = folder / CARD
    if card.is_file():
        above, loading, below = card.read_text(encoding="utf-8").partition(_LOADING)
        write_whole(card, f"{above.partition(_RESULTS)[0]}{_RESULTS}{table}{loading}{below}")


def _recovered(recovery: Recovery | None) -> str:
    """Options of a training that `moqa quantize` has."""
    if recovery is None or recovery.is_in_the_loop:
        return ""
    return f" --recover {recovery.steps}{_by(recovery)}"


def _trained_by(recovery: Recovery | None) -> str:
    """The command of a training that only `moqa recover` has."""
    if recovery is None or not recovery.is_in_the_loop:
        return ""
    bits = {"--input-bits": recovery.input_bits, "--kv-bits": recovery.kv_bits, "--rate": recovery.rate}
    how = " --weights" * recovery.weights + "".join(f" {name} {value}" for name, value in bits.items() if value)
    return f"\nmoqa recover OUT --for {recovery.steps}{_by(recovery)}{how} -o OUT --overwrite"


def _by(recovery: Recovery) -> str:
    usual = recovery.optimizer == Recovery.model_fields["optimizer"].default
    return "" if usual else f" --optimizer {recovery.optimizer}"


def _hub_id(folder: Path) -> str | None:
    """Hub id of a folder in the Hub's cache."""
    names = [part for part in folder.absolute().parts if part.startswith("models--")]
    return names[-1].removeprefix("models--").replace("--", "/") if names else None


def _licence(card: Path) -> dict[str, str]:
    """What a card says of its licence."""
    try:
        found = _FRONT.match(read_text(card)[:_FRONT_CHARACTERS])
        stated = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return {key: stated[key] for key in _LICENCE if isinstance(stated, dict) and isinstance(stated.get(key), str)}
