"""Check every byte of a checkpoint that loading uses."""

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from moqa.errors import MoqaError
from moqa.format import adjustment as adjustments
from moqa.format import cache
from moqa.format.manifest import CONFIG, MANIFEST
from moqa.format.reader import Checkpoint, read_checkpoint
from moqa.format.routing import ROUTING, read_routing
from moqa.originals.hub import on_disk
from moqa.runtime.load import load_packed
from moqa.tasks import task_of

CACHE = f"{cache.FOLDER}/{cache.RECORD}"
# names that moqa, transformers or PEFT look for in a model's folder
_USED = (
    "*.safetensors", "*.bin", "*.py", "*.jinja", "*.model", "*.spm", "*.tiktoken", "*.index.json", "*config.json",
    "*token*.json", "*vocab*", "merges.txt", "chat_template*", ROUTING, CACHE,
)  # fmt: skip
_PLACES = ("*", "additional_chat_templates/*", "custom_generate/*", CACHE)


@dataclass
class Verification:
    """What was found in a checkpoint.

    Attributes:
        checkpoint: the checkpoint.
        faults: one line for everything that is wrong.
        covered: files of which every byte was compared with a recorded hash, relative to the folder.
        uncovered: files that loading uses and whose hashes were not recorded: the checkpoint is older than those.
    """

    checkpoint: Checkpoint
    faults: list[str] = field(default_factory=list)
    covered: list[str] = field(default_factory=list)
    uncovered: list[str] = field(default_factory=list)

    def attempt(self, check: Callable[[], object], *names: str) -> None:
        """Run a check of some files."""
        try:
            check()
            self.covered += [name for name in names if name not in self.covered]
        except MoqaError as error:
            self.faults.append(str(error))
        except OSError as error:
            self.faults.append(f"{error.filename} cannot be read: {error.strerror}")


def verify(folder: str | Path) -> Verification:
    """Compare all files of a checkpoint that loading uses with their recorded hashes, and load it.

    >>> verify("runs/out").faults
    []

    Raises:
        MoqaError: if it has no readable manifest.
    """
    checkpoint = read_checkpoint(on_disk(folder, cache.CACHE_FILES))
    found, folder, manifest = Verification(checkpoint), checkpoint.folder, checkpoint.manifest
    found.attempt(checkpoint.check_layout, MANIFEST)
    weights = [*checkpoint.shards, *(shard for shards in checkpoint.nested_shards.values() for shard in shards)]
    for shard in weights if not found.faults else ():
        found.attempt(partial(checkpoint.check_file, shard, verify=True), shard.file)
    found.attempt(checkpoint.check_config, CONFIG)
    for name in sorted((manifest.companions or {}).keys() - {CONFIG}):
        found.attempt(partial(checkpoint.check_companion, name), name)
    # older manifests record weights and config.json only; routing and cache have hashes of their own
    older = manifest.companions is None
    if older and (folder / ROUTING).is_file():
        found.attempt(lambda: read_routing(folder, manifest.fingerprint), ROUTING)
    if CACHE in found.covered or (older and (folder / CACHE).is_file()):
        found.attempt(lambda: _check_cache(found), CACHE)
    for path in sorted(folder.rglob(adjustments.RECORD)):
        names = (path, path.with_name(adjustments.WEIGHTS))
        found.attempt(partial(_check_adjustment, checkpoint, path.parent), *(str(n.relative_to(folder)) for n in names))
    _name_unrecorded(found)
    if not found.faults:
        for width in (None, *manifest.nested):
            found.attempt(partial(_load, checkpoint if width is None else checkpoint.at_width(width)))
    return found


def _check_cache(found: Verification) -> None:
    files = cache.open_cache(found.checkpoint.folder, found.checkpoint.manifest.fingerprint, verify=True).record.files
    found.covered += [f"{cache.FOLDER}/{name}" for name in files]


def _check_adjustment(checkpoint: Checkpoint, folder: Path) -> None:
    if adjustments.read_adjustment(folder).record.checkpoint != checkpoint.manifest.checksum:
        raise MoqaError(f"{folder} is an adjustment of another checkpoint", "remove it")


def _name_unrecorded(found: Verification) -> None:
    """Name files that loading would use and that nothing vouches for."""
    folder, manifest = found.checkpoint.folder, found.checkpoint.manifest
    known = {MANIFEST, CONFIG, *manifest.weight_files, *(manifest.companions or {})}
    for path in sorted({path for place in _PLACES for path in folder.glob(place)}):
        name = path.relative_to(folder).as_posix()
        if name in known or path.is_dir() or not any(fnmatch(name, pattern) for pattern in _USED):
            continue
        if manifest.companions is not None or name.endswith(".safetensors"):
            found.faults.append(f"{path} is not recorded in {MANIFEST}, but loading would use it: remove it")
        elif name not in found.covered:
            found.uncovered.append(name)


def _load(checkpoint: Checkpoint) -> None:
    checkpoint.check_files(verify=False)
    model = load_packed(checkpoint, kernels="reference")
    task_of(model.config).processor(checkpoint.folder)
