"""Every artifact that a user reads: how a sound one is made and used, and how a changed one is made to look sound."""

import contextlib
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from hostile.victim import Victim

if TYPE_CHECKING:
    from moqa.planning import Plan
    from moqa.profiling import Profile

MODEL, PROFILE, PLAN, CHECKPOINT, ADJUSTMENT = "original", "profile", "plan", "checkpoint", "adjustment"
TEXT = "Der Wörterbucheintrag, 1234 and <|unusual|> text"


@dataclass(frozen=True)
class Artifact:
    """One kind.

    Attributes:
        name: of the kind, and of its folder among the sound ones.
        use: what a user does with the folder; gives all that depends on it.
        check: what refuses a folder whose use gave something else, before work is built on it.
        seal: makes the checksums of a changed folder again; None if it has none.
    """

    name: str
    use: Callable[[Path], object]
    seal: Callable[[Victim], None] | None = None
    check: Callable[[Path], None] = lambda _: None


def with_every_encoding(plan: "Plan", profile: "Profile") -> "Plan":
    """The plan with one unit after the other in another encoding, at the nearest width that it has."""
    from moqa.format.encodings import ENCODINGS
    from moqa.format.scheme import Scheme
    from moqa.planning.account import account_of

    units = {}
    for (name, scheme), encoding in zip(plan.units.items(), cycle(("trellis", "table", "int"))):
        width = min(ENCODINGS[encoding].widths, key=lambda width: abs(width - scheme.width))
        units[name] = Scheme(width=width, group_size=scheme.group_size, encoding=encoding)
    return plan.model_copy(update={"units": units, "account": account_of(profile, units)})


def make_all(model: Path, texts: list, folder: Path) -> Path:
    """One sound artifact of each kind, all of one model, each in a folder of its own."""
    import shutil

    import moqa
    from moqa.planning import Budget, plan
    from moqa.planning.run import for_file
    from moqa.profiling import profile
    from moqa.quantization import quantize
    from moqa.storage.artifact import write_sealed

    shutil.copytree(model, folder / MODEL)
    measured = profile(folder / MODEL, texts[:2], folder / PROFILE, samples=2, context=16, self_samples=2)
    planned = with_every_encoding(plan(measured, Budget.parse(bpw=6)), measured)
    write_sealed(for_file(planned, folder / PLAN / "plan.json"), folder / PLAN / "plan.json")
    quantize(folder / MODEL, planned, folder / CHECKPOINT, method="rtn", profile=measured, cache="full")
    moqa.adjust(folder / CHECKPOINT, texts[2:3], folder / ADJUSTMENT, samples=8, budget="5%")
    return folder


def artifacts(sound: Path) -> list[Artifact]:
    """All kinds; `sound` is from `make_all`."""
    import torch
    import typer

    import moqa
    from moqa.cli.verify import verify
    from moqa.errors import MoqaError, Stopped
    from moqa.models.view import open_model
    from moqa.planning import check_profile
    from moqa.tasks.causal_lm import load_tokenizer

    ids = torch.arange(12)[None] * 531 % 8192
    measured, packed = moqa.read_profile(sound / PROFILE), moqa.load(sound / CHECKPOINT)[0]
    planned = moqa.read_plan(sound / PLAN / "plan.json")

    @torch.no_grad()
    def original(folder: Path) -> object:
        return open_model(folder).model(ids).logits, load_tokenizer(folder)(TEXT).input_ids

    def is_planned(folder: Path) -> None:
        """Refuse an original that is not the one of the plan, as `quantize` does before it begins."""

        def begun(*_: object, **__: object) -> None:
            raise Stopped

        with contextlib.suppress(Stopped):
            moqa.quantize(folder, planned, folder.parent / "out", method="rtn", profile=measured, report=begun)

    def is_verified(folder: Path) -> None:
        """What `moqa verify` says."""
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                verify(folder)
        except typer.Exit as stop:
            if stop.exit_code:
                raise MoqaError("not sound") from None

    def profile(folder: Path) -> object:
        read = moqa.read_profile(folder)
        made = moqa.plan(read, "6bpw")
        check_profile(planned, read)
        samples = [read.samples(name) for name in read.statistics]
        return made.units, made.mixture, made.account, made.fingerprint, read.record.distributions, samples

    def plan(folder: Path) -> object:
        read = moqa.read_plan(folder / "plan.json")
        check_profile(read, measured)
        return read.model_copy(update={"profile": ""})

    @torch.no_grad()
    def checkpoint(folder: Path) -> object:
        model, tokenizer = moqa.load(folder)
        return model(ids).logits, tokenizer(TEXT).input_ids

    @torch.no_grad()
    def adjustment(folder: Path) -> object:
        packed.apply(folder)
        name = packed.adjustments.current
        try:
            return packed(ids).logits, name
        finally:
            packed.revert()
            packed.adjustments.drop(name)

    return [
        Artifact(MODEL, original, check=is_planned), Artifact(PROFILE, profile, _seal_profile),
        Artifact(PLAN, plan, lambda victim: _seal(victim, "plan.json")),
        Artifact(CHECKPOINT, checkpoint, _seal_checkpoint, is_verified),
        Artifact(ADJUSTMENT, adjustment, _seal_adjustment),
    ]  # fmt: skip


def same(found: object, wanted: object) -> bool:
    """Whether two results are equal, tensors included."""
    import torch

    if isinstance(found, list | tuple) and isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    if isinstance(found, torch.Tensor) and isinstance(wanted, torch.Tensor):
        return torch.equal(found, wanted)
    return bool(found == wanted)


def _seal(victim: Victim, name: str, **changes: object) -> None:
    from moqa.storage.artifact import checksum

    data = victim.json(name) | changes
    victim.write_json(name, data | {"checksum": checksum(data)})


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _stored(victim: Victim, name: str) -> dict:
    content = victim.read(name)
    return {"bytes": len(content), "sha256": _digest(content)}


def _seal_profile(victim: Victim) -> None:
    files = victim.json("profile.json")["files"]
    _seal(victim, "profile.json", files={name: _digest(victim.read(name)) for name in files})


def _seal_adjustment(victim: Victim) -> None:
    _seal(victim, "adjustment.json", weights=_stored(victim, "adjustment.safetensors"))


def _seal_checkpoint(victim: Victim) -> None:
    data = json.loads(victim.read("moqa.json"))
    changes = {"files": {name: _stored(victim, name) for name in data["files"]}}
    if data.get("companions"):
        changes["companions"] = {name: _stored(victim, name) for name in data["companions"]}
    _seal(victim, "moqa.json", **changes, config=_digest(victim.read("config.json")))
