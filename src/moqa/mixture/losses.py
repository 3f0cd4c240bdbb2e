"""Losses of variants on the router's windows, measured once and kept beside the profile."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moqa.evaluation.measure import Reference
from moqa.format import adjustment as adjustments
from moqa.format.adjustment import read_adjustment
from moqa.format.reader import open_checkpoint, read_checkpoint
from moqa.mixture.measure import TokenLosses, token_losses
from moqa.models.view import ModelView
from moqa.progress import Report
from moqa.runtime.load import load_packed
from moqa.tasks import Samples

Losses = dict[str, dict[str, TokenLosses]]  # variant -> distribution -> losses


class LossStore:
    """A folder of losses, one file for each variant and set of windows, named by their content.

    >>> from moqa.data import Windows
    >>> windows = Windows("wiki", tokens, text_bytes=120, hashes=np.zeros(0, np.uint64))
    >>> store = LossStore(Path("runs/mix.measured/losses"), [windows])
    >>> store.path("0" * 64).parent.name
    'losses'

    Args:
        folder: may not exist yet.
        windows: of each distribution.
    """

    def __init__(self, folder: Path, windows: Sequence[Samples]) -> None:
        self._folder, self._windows = folder, list(windows)
        digest = hashlib.sha256()
        for cut in windows:
            digest.update(cut.name.encode() + cut.inputs.numpy().tobytes())
        self._digest = digest.hexdigest()

    def path(self, checksum: str) -> Path:
        """The file of a variant with a checksum."""
        return self._folder / f"{checksum[:16]}-{self._digest[:16]}.safetensors"

    def all(self, folder: Path, of: Mapping[str, str], view: ModelView, report: Report) -> Losses:
        """Losses of all variants in a folder; those that no file holds are measured.

        Args:
            folder: of the variants.
            of: variant -> name of its checkpoint; itself if it is one.
            view: the original.
            report: called with the progress.
        """
        missing = [name for name in of if self._saved(folder / name) is None]
        if missing:
            reference = Reference.of(view.model, list(self._windows), report)
            self._folder.mkdir(parents=True, exist_ok=True)
            for base in dict.fromkeys(of[name] for name in missing):
                model = load_packed(open_checkpoint(folder / base), kernels="reference")
                for name in (name for name in missing if of[name] == base):
                    if name != base:
                        model.adjustments.switch(model.adjustments.hold(folder / name, name))
                    found = token_losses(model, self._windows, reference, report)
                    self._save(self.path(checksum_of(folder / name)), found)
        return {name: self._saved(folder / name) or {} for name in of}

    def _saved(self, variant: Path) -> dict[str, TokenLosses] | None:
        try:
            tensors = load_file(self.path(checksum_of(variant)))
        except (OSError, SafetensorError):  # missing, or cut off by a kill
            return None
        return {cut.name: TokenLosses.among(tensors, cut.name) for cut in self._windows}

    def _save(self, path: Path, found: Mapping[str, TokenLosses]) -> None:
        fresh = path.with_name(f".{path.name}.new")
        save_file({key: t.contiguous() for name, one in found.items() for key, t in one.tensors(name).items()}, fresh)
        fresh.rename(path)


def checksum_of(folder: Path) -> str:
    """The checksum of the manifest of a checkpoint, or of an adjustment."""
    if (folder / adjustments.RECORD).is_file():
        return read_adjustment(folder).record.checksum
    return read_checkpoint(folder).manifest.checksum
