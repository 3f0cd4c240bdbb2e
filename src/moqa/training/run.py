"""`moqa.recover`: train what a checkpoint stores beside its integers and codes, so that it answers as the original."""

import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from moqa import __version__
from moqa.errors import MoqaError
from moqa.format.manifest import Recovery
from moqa.format.reader import Checkpoint, open_checkpoint
from moqa.memory.limit import MemoryLimit
from moqa.memory.process import settle
from moqa.models.layerwise import LayerwiseModel
from moqa.models.view import ModelView, open_model
from moqa.originals import folder as original
from moqa.originals.fingerprint import differing_part
from moqa.originals.hub import on_disk
from moqa.planning import PLAN, read_plan
from moqa.profiling import Profile, read_profile
from moqa.progress import Report, quiet
from moqa.storage.folders import check_free
from moqa.storage.paths import found
from moqa.storage.resumable import ResumableRun, as_json, check_space, resumable, tidy
from moqa.training.blockwise import BlockwiseTraining
from moqa.training.length import TrainingLength
from moqa.training.loop import NotFiniteError, Training
from moqa.training.memory import trains_whole
from moqa.training.optimizers import DEFAULT_OPTIMIZER, OPTIMIZERS
from moqa.training.samples import TrainingSamples
from moqa.training.student import InTheLoop, Student
from moqa.training.teaching import Teaching
from moqa.training.write import Trained, write_trained

DEFAULT_LENGTH = "15m"
# largest relative change of a scale in one step, about
_RATE = 2e-3
# copies of the hidden states of all samples on the disk while blocks are trained: of three models, at two blocks
_HIDDEN = 6


@dataclass(frozen=True)
class Recovered:
    """The result of `moqa recover`.

    Attributes:
        checkpoint: folder of the new checkpoint.
        recovery: as its manifest records it.
        seconds: that the training took.
    """

    checkpoint: str
    recovery: Recovery
    seconds: float


def recover(
    checkpoint: str | Path,
    out: str | Path,
    *,
    length: str = DEFAULT_LENGTH,
    profile: Profile | None = None,
    model: str | Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    seed: int = 0,
    optimizer: str = DEFAULT_OPTIMIZER,
    weights: bool = False,
    input_bits: int | None = None,
    kv_bits: int | None = None,
    rate: float | None = None,
    report: Report = quiet,
    memory: MemoryLimit | None = None,
) -> Recovered:
    """Train scales, zero-points, norms and routers of a checkpoint, so that it answers as the original; adds no bytes.

    >>> result = moqa.recover("runs/out", "runs/recovered", length="2", profile=moqa.read_profile("runs/profile"))
    >>> result.recovery.steps
    2

    The divergence from the original's predictions is trained on the samples of the profile, in the mixture that the
    checkpoint was fitted on. If the model does not fit the memory, each block is trained to give the original's hidden
    states. One sample in eight is held out: if they do not say that the result is better, the new checkpoint stores
    what the old one did. Training by steps gives the same bytes again, also after a kill.

    Args:
        checkpoint: folder of a checkpoint, or its Hub id.
        out: checkpoint folder to make; may be the same, with `overwrite`.
        length: of the training: a time such as `15m`, or a number of steps such as `300`.
        profile: that the checkpoint was made from, which holds the samples; None reads the one that its plan names.
        model: the original; None means where the checkpoint says.
        overwrite: replace a checkpoint that exists at `out`.
        restart: start again from the beginning and discard what an earlier run has finished.
        seed: of the order of the samples.
        optimizer: name of a registered one: adamw, muon, sgd or soap.
        weights: train integers, too, by the straight-through estimator.
        input_bits: 8: round inputs while it is trained as native kernels do; None leaves them.
        kv_bits: 8: round keys and values while it is trained as `--kv-bits 8` does; None leaves them.
        rate: largest relative change of a scale in one step, about; None means 0.002.
        report: called with the progress, see `moqa.progress.Report`.
        memory: memory that the process may take; None means all free memory.

    Raises:
        MoqaError: if the checkpoint, the original or the profile is missing, damaged or another one's, a sample is not
            enough to hold one out, the optimizer is unknown or its package missing, the memory is too small for one
            block, inputs or the cache cannot have such bits, or `out` exists.

    Training of scales by the original's predictions is part of SiLQ (arXiv 2507.16933), and of EfficientQAT (arXiv
    2407.11062), which also freezes the integers.
    """
    out, wanted, began = Path(out), TrainingLength.parse(length), time.perf_counter()
    OPTIMIZERS.find(optimizer)
    loop = InTheLoop(weights, input_bits, kv_bits, rate)
    packed = open_checkpoint(on_disk(checkpoint))
    manifest = packed.manifest
    if manifest.nested:
        raise MoqaError(
            f"{checkpoint} has nested widths, which a training of one of them would change",
            f"take one out: moqa export {checkpoint} --to moqa --width {min(manifest.nested)} -o ONE",
        )
    folder = _original(packed) if model is None else original.locate(model)
    other = differing_part(folder, manifest.fingerprint)
    if other:
        raise MoqaError(f"{folder} is not the model that {checkpoint} was made from", f"it has other {other}")
    known = _checked(profile or _profile_of(packed), packed)
    job = as_json({
        "moqa": __version__, "checkpoint": manifest.checksum, "length": length, "seed": seed, "optimizer": optimizer,
        "samples": known.digest(manifest.mixture), **loop.chosen(),
    })  # fmt: skip
    if tidy(out) == job and (done := open_checkpoint(out).manifest.recovery) is not None:
        return Recovered(str(out), done, 0.0)
    check_free(out, overwrite)
    view, memory = open_model(folder, keep=False), memory or MemoryLimit.free()
    loop.check(view)
    settle()
    whole = trains_whole(view, memory, weights)
    samples = sum(len(known.samples(name)) * view.task.count(known.samples(name)[:1]) for name in manifest.mixture)
    check_space(out, 2 * packed.bytes + (0 if whole else _HIDDEN * 4 * samples * view.stream))
    with resumable(out, job, overwrite, restart) as work:
        begun = (work.done("begun") or {"whole": whole})["whole"]
        if begun and not whole:
            what = f"{memory} is too small to go on with a training of the whole model"
            raise MoqaError(what, "give as much as before, or --restart")
        work.mark_done("begun", {"whole": begun})
        trained: Trained
        if begun:
            trained, recovery = _train_whole(
                view, packed, known, work, wanted, seed=seed, report=report, optimizer=optimizer, loop=loop
            )  # fmt: skip
        else:
            trained = BlockwiseTraining(
                view, packed, known, work, seed=seed, report=report, optimizer=optimizer, loop=loop
            )  # fmt: skip
            recovery = trained.run(wanted, loop.rate or _RATE)
        write_trained(packed, trained if recovery.kept else None, work.result, recovery, folder)
    return Recovered(str(out), recovery, time.perf_counter() - began)


def check_training(length: str | None, optimizer: str) -> None:
    """Refuse a training that could not begin, before anything else is done.

    >>> check_training("15m", "adam")
    Traceback (most recent call last):
    moqa.errors.MoqaError: --optimizer adam is unknown: there are adamw, muon, sgd, soap

    Args:
        length: as users type it; None if nothing is to be trained.
        optimizer: as users type it.

    Raises:
        MoqaError: if it is no length, the optimizer is unknown or its package is missing, or there is nothing for it to
            train.
    """
    OPTIMIZERS.find(optimizer)
    if length is not None:
        TrainingLength.parse(length)
    elif optimizer != DEFAULT_OPTIMIZER:
        raise MoqaError(f"--optimizer {optimizer} has nothing to train", "give --recover 15m, or leave it out")


def _train_whole(
    view: ModelView, packed: Checkpoint, known: Profile, work: ResumableRun, wanted: TrainingLength, *, seed: int,
    report: Report, optimizer: str, loop: InTheLoop,
) -> tuple[Student, Recovery]:  # fmt: skip
    stages, mixture = LayerwiseModel(view.model), packed.manifest.mixture
    samples = TrainingSamples(
        stages, {name: known.samples(name) for name in mixture}, mixture, seed=seed, report=report
    )  # fmt: skip
    teaching = Teaching(stages, samples, Student(view, packed, loop=loop))
    with teaching.student.in_place():
        begun = work.done("length") or teaching.begin(wanted)
        work.mark_done("length", begun)
        training = Training(
            teaching.student.parameters(), teaching.loss, begun["steps"], loop.rate or _RATE, optimizer=optimizer
        )  # fmt: skip
        try:
            training.run(work, report)
        except NotFiniteError as error:
            bad = teaching.first_bad_block()
            warnings.warn(f"the training ended at {error}, whose loss is not a number: {bad}", stacklevel=2)
        after, routing = teaching.held_out()
    # fewer steps than were meant, if a loss was not a number
    steps = (work.done("training") or {"step": 0})["step"]
    ended = {"steps": steps, "after": after, "routing_after": routing, "kept": after < begun["before"]}
    return teaching.student, Recovery(**(begun | ended | loop.chosen()), optimizer=optimizer)


def _original(packed: Checkpoint) -> Path:
    """Folder of the model that a checkpoint says it was made from."""
    try:
        return original.locate(found(packed.manifest.model, packed.folder))
    except MoqaError as error:
        raise MoqaError(f"the original of {packed.folder} is missing", f"{error}; give --model") from None


def _checked(profile: Profile, packed: Checkpoint) -> Profile:
    """Refuse a profile whose samples are not those that a checkpoint was fitted on, or are too few."""
    manifest = packed.manifest
    missing = sorted(manifest.mixture.keys() - profile.statistics.keys())
    if profile.record.fingerprint != manifest.fingerprint or missing:
        problem = f"lacks {missing[0]}" if missing else f"is of {profile.record.model}"
        raise MoqaError(f"profile {profile.folder} {problem}", f"give the one that {packed.folder} was made from")
    for name, fitted in manifest.fitted.items():
        if profile.record.distributions[name].fitted != fitted:
            problem = f"profile {profile.folder} has other samples of {name} than {packed.folder} was fitted on"
            raise MoqaError(problem, "give the one that it was made from")
    if not any(len(profile.samples(name)) > 1 for name in manifest.mixture):
        raise MoqaError(f"profile {profile.folder} has one sample", "none can be held out: profile more --samples")
    return profile


def _profile_of(packed: Checkpoint) -> Profile:
    """The profile that the plan beside a checkpoint names."""
    try:
        return read_profile(read_plan(packed.folder / PLAN).profile)
    except MoqaError as error:
        raise MoqaError(f"the samples of {packed.folder} are missing", f"{error}; give --profile") from None
