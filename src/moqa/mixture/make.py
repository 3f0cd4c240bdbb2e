"""Make the variants of a mixture in one folder; files with equal bytes are stored once."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moqa.adjustment import adjust
from moqa.data import Source
from moqa.errors import MoqaError
from moqa.format import adjustment as adjustments
from moqa.format.adjustment import check_fits, read_adjustment
from moqa.format.cache import write_cache
from moqa.format.manifest import Fitted
from moqa.format.reader import Checkpoint, is_checkpoint, read_checkpoint
from moqa.memory.limit import MemoryLimit
from moqa.mixture.variants import CheckpointVariant, MadeVariant, Specs, of_checkpoint
from moqa.models.view import ModelView
from moqa.planning import Plan, plan, read_plan
from moqa.profiling import Profile
from moqa.progress import Report
from moqa.quantization import quantize
from moqa.quantization.cache import WHOLE_ORIGINAL, cache_layers, parse_cache
from moqa.storage.artifact import file_hash
from moqa.storage.resumable import ResumableRun


@dataclass(frozen=True)
class MadeFrom:
    """What the variants of a mixture are made from.

    Attributes:
        model: the original, as typed.
        view: the same, open.
        profile: of all distributions that a checkpoint is fitted on; None if there is no such checkpoint.
        sources: distribution -> its part that variants are fitted on.
        budget: of checkpoints that have none of their own.
        memory: what quantizing may use.
        seed: of adjustments.
    """

    model: str
    view: ModelView
    profile: Profile | None
    sources: Mapping[str, Source]
    budget: str | None
    memory: MemoryLimit | None = None
    seed: int = 0

    def plan(self, spec: CheckpointVariant) -> Plan:
        """The plan of a checkpoint."""
        if spec.plan is not None:
            return read_plan(Path(spec.plan))
        assert self.profile is not None
        more = {name: value for name in ("widths", "encodings", "groups") if (value := getattr(spec, name)) is not None}
        return plan(
            self.profile, spec.budget or self.budget, strategy=spec.strategy, known=spec.known, hedge=spec.hedge, **more
        )


def make_variant(name: str, specs: Specs, source: MadeFrom, work: ResumableRun, report: Report) -> None:
    """Make one variant as the folder of its name in the result of a run; checkpoints before their adjustments.

    Raises:
        MoqaError: if it cannot be made.
    """
    spec, out = specs[name], work.result / name
    shutil.rmtree(out, ignore_errors=True)
    if isinstance(spec, MadeVariant):
        _take(spec, out)
    elif isinstance(spec, CheckpointVariant):
        quantize(
            source.model, source.plan(spec), out, method=spec.method, profile=None if spec.plan else source.profile,
            view=source.view, memory=source.memory, report=report,
        )  # fmt: skip
    else:
        base = work.result / of_checkpoint(name, specs)
        with _with_original(base, source, work.folder / f"{name}.with-original") as folder:
            adjust(
                folder, [source.sources[spec.adjustment]], out, samples=spec.samples, budget=spec.bytes, mode=spec.mode,
                seed=source.seed, report=report,
            )  # fmt: skip


def check_made(name: str, specs: Specs, folder: Path, fingerprint: str) -> Mapping[str, Fitted]:
    """Refuse a variant of another model or tokenizer than the others; returns the texts that it was fitted on.

    Raises:
        MoqaError: naming what differs.
    """
    of = folder / of_checkpoint(name, specs)
    packed = read_checkpoint(of)
    if packed.manifest.fingerprint != fingerprint:
        raise MoqaError(
            f"variant {name} was made from another model ({packed.manifest.fingerprint[:8]})",
            f"the others are of {fingerprint[:8]}",
        )
    _check_same_reader(name, packed, folder, specs)
    if of.name == name:
        return packed.manifest.fitted
    adjustment = read_adjustment(folder / name)
    check_fits(adjustment, packed)
    return adjustment.record.fitted


def share_files(folder: Path, names: Sequence[str]) -> int:
    """Store files with equal bytes once, as hard links, in the folders of variants.

    Every folder stays a checkpoint of its own that all commands read.

    Returns:
        Bytes that are saved.
    """
    first: dict[tuple[int, str], Path] = {}
    saved = 0
    for name in names:
        for path in sorted(file for file in (folder / name).rglob("*") if file.is_file()):
            size = path.stat().st_size
            same = first.setdefault((size, file_hash(path)), path)
            if same is not path and not path.samefile(same):
                fresh = path.with_name(f".{path.name}.link")
                _link(same, fresh)
                fresh.rename(path)
            saved += size if same is not path and path.samefile(same) else 0
    return saved


def weight_bytes(folder: Path) -> int:
    """Bytes of all weight files in a folder, those that are the same file once."""
    files = {(s.st_dev, s.st_ino): s.st_size for path in folder.rglob("*.safetensors") for s in [path.stat()]}
    return sum(files.values())


def _link(source: str | Path, target: str | Path) -> None:
    """A second name of a file, or a copy where the file system has one name for each."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _take(spec: MadeVariant, out: Path) -> None:
    folder = Path(spec.folder)
    if is_checkpoint(folder):
        # the cache is for making adjustments; a mixture does not load it
        names = read_checkpoint(folder).manifest
        files = [*names.files, *(names.companions or {}), "moqa.json"]
        for name in files:
            if (folder / name).is_file():
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, out / name)
        return
    read_adjustment(folder)
    out.mkdir(parents=True)
    for name in (adjustments.RECORD, adjustments.WEIGHTS):
        shutil.copyfile(folder / name, out / name)


@contextmanager
def _with_original(base: Path, source: MadeFrom, folder: Path) -> Iterator[Path]:
    """A checkpoint with the whole original beside it, which adjustments are made from; removed at the end."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder, copy_function=_link)
    try:
        manifest = read_checkpoint(base).manifest
        assert source.profile is not None
        layers = cache_layers(source.view, source.profile, tuple(manifest.fitted), parse_cache(WHOLE_ORIGINAL))
        write_cache(folder, manifest.fingerprint, None, manifest.layers, layers)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_same_reader(name: str, packed: Checkpoint, folder: Path, specs: Specs) -> None:
    """Refuse a checkpoint whose tokenizer or configuration is not that of the first one."""
    first = read_checkpoint(folder / next(n for n in specs if of_checkpoint(n, specs) == n))
    ours, theirs = (one.manifest.companions or {} for one in (packed, first))
    for file in sorted(ours.keys() | theirs.keys()):
        if file.startswith(("tokenizer", "preprocessor")) and ours.get(file) != theirs.get(file):
            what = "tokenizer" if file.startswith("tokenizer") else "image processor"
            raise MoqaError(f"variant {name} has another {what}", f"its {file} is not that of {first.folder.name}")
    if packed.manifest.kept != first.manifest.kept:
        raise MoqaError(
            f"variant {name} keeps other tensors than {first.folder.name}", "they are no variants of one model"
        )
