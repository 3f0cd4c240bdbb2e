"""The end of building a mixture: which variants are choices, the router, and the manifest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moqa import __version__
from moqa.data import Source
from moqa.format.manifest import Fitted
from moqa.format.reader import open_checkpoint
from moqa.format.writer import stored_file
from moqa.mixture.features import read
from moqa.mixture.losses import Losses, checksum_of
from moqa.mixture.make import weight_bytes
from moqa.mixture.record import (
    ROUTER,
    MixtureAccount,
    MixtureRecord,
    RouterRecord,
    VariantRecord,
    write_mixture,
)
from moqa.mixture.router import ROUTERS, stored
from moqa.mixture.threshold import TrainedRouter, train
from moqa.mixture.train import RouterSamples
from moqa.progress import Report
from moqa.runtime.load import load_packed
from moqa.tasks import Samples

CHECK_EVERY = 4


@dataclass(frozen=True)
class MeasuredVariants:
    """Variants that are made and measured, in the folder of a mixture.

    Attributes:
        folder: of the mixture, still being written.
        of: variant -> name of its checkpoint; itself if it is one. The first one is a checkpoint.
        windows: of the router.
        sources: that they were cut from.
        losses: on the windows.
        shared: bytes that are stored once instead of several times.
        model: the original, as it is recorded.
    """

    folder: Path
    of: Mapping[str, str]
    windows: Sequence[Samples]
    sources: Sequence[Source]
    losses: Losses
    shared: int
    model: str

    def finish(self, kind: str, labels: str, seed: int, report: Report) -> None:
        """Train the router and write the manifest.

        Args:
            kind: of the router.
            labels: which loss makes its labels.
            seed: of its training.
            report: called per epoch.
        """
        loss = {n: {text: getattr(one, labels) for text, one in found.items()} for n, found in self.losses.items()}
        checks = {cut.name: held_out_windows(len(cut.inputs)) for cut in self.windows}
        means = {name: {t: mean_loss(found[t][checks[t]]) for t in checks} for name, found in loss.items()}
        sizes = {name: weight_bytes(self.folder / name) for name in self.of}
        beaten = beaten_variants(means, {n: sizes[n] + (sizes[b] if b != n else 0) for n, b in self.of.items()})
        choices = tuple(name for name in self.of if name not in beaten)
        default = min(choices, key=lambda name: sum(means[name].values()))
        base = next(iter(self.of))
        model = load_packed(open_checkpoint(self.folder / base, verify=False), kernels="reference")
        samples = RouterSamples.of(
            read(model, torch.cat([cut.inputs for cut in self.windows]), ROUTERS.find(kind).reads),
            torch.stack([torch.cat([loss[name][cut.name] for cut in self.windows]) for name in choices]),
            [len(cut.inputs) for cut in self.windows],
        )
        held = torch.cat([checks[cut.name] for cut in self.windows])
        trained = train(
            kind, samples.some(~held), samples.some(held), default=choices.index(default), seed=seed, report=report
        )
        save_file(stored(trained.router), self.folder / ROUTER)
        manifest = open_checkpoint(self.folder / base, verify=False).manifest
        record = MixtureRecord(
            moqa=__version__, model=self.model, model_type=manifest.model_type, fingerprint=manifest.fingerprint,
            seed=seed, default=default, variants=self._variants(means, sizes, beaten),
            router=self._router(trained, kind, labels, choices, samples.features.shape),
            account=self._account(sizes),
        )  # fmt: skip
        write_mixture(record, self.folder)

    def _variants(
        self, means: Mapping[str, Mapping[str, float]], sizes: Mapping[str, int], beaten: Mapping[str, str]
    ) -> dict[str, VariantRecord]:
        return {
            name: VariantRecord(
                kind="checkpoint" if base == name else "adjustment", of=None if base == name else base,
                checksum=checksum_of(self.folder / name), bytes=sizes[name], beaten_by=beaten.get(name),
                loss={text: _rounded(value) for text, value in means[name].items()},
            )
            for name, base in self.of.items()
        }  # fmt: skip

    def _router(
        self, trained: TrainedRouter, kind: str, labels: str, choices: tuple[str, ...], shape: torch.Size
    ) -> RouterRecord:
        fitted = {
            one.name: Fitted.of(one.digest, cut.hashes) for one, cut in zip(self.sources, self.windows, strict=True)
        }
        return RouterRecord(
            kind=kind, base=next(iter(self.of)), features=shape[2], choices=choices, threshold=trained.threshold,
            labels=labels, context=shape[1], fitted=fitted,
            windows={cut.name: len(cut.inputs) for cut in self.windows},
            usage={name: round(share, 6) for name, share in zip(choices, trained.usage, strict=True)},
            left_out={self.windows[n].name: _rounded(change) for n, change in trained.left_out.items()},
            loss=_rounded(trained.loss), single=_rounded(trained.single), oracle=_rounded(trained.oracle),
            file=stored_file(self.folder / ROUTER),
        )  # fmt: skip

    def _account(self, sizes: Mapping[str, int]) -> MixtureAccount:
        router = (self.folder / ROUTER).stat().st_size
        adjusted = {b: max((sizes[n] for n in self.of if self.of[n] == b != n), default=0) for b in self.of.values()}
        return MixtureAccount(
            total=weight_bytes(self.folder), router=router, shared=self.shared,
            resident=max(sizes[base] + more for base, more in adjusted.items()) + router,
        )  # fmt: skip


def held_out_windows(count: int) -> Tensor:
    """[count] which windows are held out from the router's training: one in four.

    >>> held_out_windows(4)
    tensor([False, False, False,  True])
    """
    every = min(CHECK_EVERY, count)
    return torch.arange(count) % every == every - 1


def mean_loss(token_loss: Tensor) -> float:
    """Mean loss of continuations over [windows, tokens] and all lengths of prompts that count."""
    return float(RouterSamples.of(torch.zeros(()), token_loss[None], [len(token_loss)]).at_cuts.mean())


def beaten_variants(means: Mapping[str, Mapping[str, float]], sizes: Mapping[str, int]) -> dict[str, str]:
    """Variants that another one, no larger, beats on every distribution: name -> the other.

    >>> beaten_variants({"a": {"wiki": 1.0}, "b": {"wiki": 2.0}}, {"a": 10, "b": 10})
    {'b': 'a'}

    Args:
        means: variant -> distribution -> loss.
        sizes: variant -> bytes of all that it takes.
    """
    found: dict[str, str] = {}
    for name, mine in means.items():
        for other, theirs in means.items():
            if sizes[other] <= sizes[name] and other not in found and all(theirs[text] < mine[text] for text in mine):
                found[name] = other
                break
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
