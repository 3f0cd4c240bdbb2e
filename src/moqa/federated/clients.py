"""Samples of simulated clients: images split by their labels, or texts in a language each."""

import gzip
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from moqa.errors import MoqaError
from moqa.federated.settings import Experiment

_FASHION = Path("/usr/share/datasets/fashion-mnist")
_CIFAR, _TEXTS = Path("runs/cifar10"), Path("reference/text")
_LEAST = 8  # samples of a client: a split with fewer is drawn again
_DRAWS = 1000
CONTEXT = 64  # bytes of a sample of text


@dataclass(frozen=True)
class Samples:
    """Of all clients, and held-out ones.

    Attributes:
        inputs: [samples, ...] float32 images, or int64 bytes of text.
        labels: [samples] int64 classes; of text its number.
        clients: [samples] number of the client, int64.
        test_inputs: held out.
        test_labels: held out.
    """

    inputs: Tensor
    labels: Tensor
    clients: NDArray[np.int64]
    test_inputs: Tensor
    test_labels: Tensor

    def of(self, client: int, batch: int, seed: int | tuple[int, ...] | None = None) -> list[Any]:
        """Batches of a client, shuffled by a seed."""
        own = np.flatnonzero(self.clients == client)
        if seed is not None:
            own = np.random.default_rng(seed).permutation(own)
        parts = [torch.from_numpy(own[start : start + batch]) for start in range(0, len(own), batch)]
        return [self.batch(self.inputs[part], self.labels[part]) for part in parts]

    def test(self, batch: int = 250) -> list[Any]:
        """Held-out batches."""
        pairs = zip(self.test_inputs.split(batch), self.test_labels.split(batch), strict=True)
        return [self.batch(inputs, labels) for inputs, labels in pairs]

    @staticmethod
    def batch(inputs: Tensor, labels: Tensor) -> Any:
        """As models take it: of text, a mapping that has the text itself as labels."""
        return {"input_ids": inputs, "labels": inputs} if inputs.dtype == torch.int64 else (inputs, labels)


@lru_cache(maxsize=2)
def samples_of(experiment: Experiment) -> Samples:
    """Samples of an experiment, the same on every call.

    Raises:
        MoqaError: if the data are not there, saying how to get them, or too few for the clients.
    """
    train, test = _READERS[experiment.data](experiment.folder)
    generator = np.random.default_rng(experiment.seed)
    chosen = generator.permutation(len(train[1]))[: experiment.samples]
    held_out = np.random.default_rng(0).permutation(len(test[1]))[: experiment.test_samples]
    labels = train[1][chosen]
    if experiment.data == "text":
        # one language each: clients of the same text share it out
        texts = int(labels.max()) + 1
        order = np.arange(len(labels)) % -(-experiment.clients // texts)
        clients = labels.numpy() + texts * order
        clients = np.where(clients < experiment.clients, clients, labels.numpy() % experiment.clients)
    else:
        clients = dirichlet(labels.numpy(), experiment.clients, experiment.split, generator)
    return Samples(_scaled(train[0][chosen]), labels, clients, _scaled(test[0][held_out]), test[1][held_out])


def dirichlet(labels: NDArray, clients: int, alpha: float, generator: np.random.Generator) -> NDArray[np.int64]:
    """Number of the client of every sample: each class is shared out by a Dirichlet distribution.

    >>> found = dirichlet(np.zeros(64, int), clients=4, alpha=float("inf"), generator=np.random.default_rng(0))
    >>> np.bincount(found).tolist()
    [16, 16, 16, 16]

    Args:
        labels: [samples] classes.
        clients: number of them.
        alpha: small for skewed splits, infinite for equal shares.
        generator: of the split; it is drawn again until every client has 8 samples.

    Raises:
        MoqaError: if there are too few samples.

    Hsu, Qi, Brown: Measuring the effects of non-identical data distribution (arXiv 1909.06335).
    """
    if len(labels) < 2 * _LEAST * clients:
        raise MoqaError(
            f"{len(labels)} samples are too few for {clients} clients", f"give {2 * _LEAST * clients} or more"
        )
    found = generator.permutation(np.arange(len(labels)) % clients)
    if np.isinf(alpha):
        return found
    for _ in range(_DRAWS):
        for label in np.unique(labels):
            own = np.flatnonzero(labels == label)
            ends = (np.cumsum(generator.dirichlet(np.full(clients, alpha))) * len(own)).astype(int)[:-1]
            for client, part in enumerate(np.split(generator.permutation(own), ends)):
                found[part] = client
        if np.bincount(found, minlength=clients).min() >= _LEAST:
            return found
    raise MoqaError(f"split={alpha} leaves clients without data", "give more samples, fewer clients or a larger split")


def _scaled(inputs: Tensor) -> Tensor:
    """Images as models take them, text as it is."""
    return inputs.float() / 255 - 0.5 if inputs.dtype == torch.uint8 else inputs


# a study reads the same files for every run
@lru_cache(maxsize=1)
def _fashion(folder: Path | None) -> Any:
    folder = folder or _FASHION
    return [
        (_idx(folder / f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28),
         _idx(folder / f"{name}-labels-idx1-ubyte.gz", 8).long())
        for name in ("train", "t10k")
    ]  # fmt: skip


def _idx(path: Path, header: int) -> Tensor:
    try:
        data = gzip.decompress(path.read_bytes())
    except OSError as error:
        raise MoqaError(f"{path} cannot be read ({error})", "apt-get install dataset-fashion-mnist") from None
    return torch.frombuffer(bytearray(data[header:]), dtype=torch.uint8)


@lru_cache(maxsize=1)
def _cifar(folder: Path | None) -> Any:
    folder, found = folder or _CIFAR, []
    for name in ("train", "test"):
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            raise MoqaError(f"{path} is missing", f"collect it with: python recipes/cifar10.py -o {folder}")
        data = load_file(path)
        found.append((data["images"].permute(0, 3, 1, 2), data["labels"]))
    return found


@lru_cache(maxsize=1)
def _text(folder: Path | None) -> Any:
    folder, found = folder or _TEXTS, []
    for name in ("calib", "test"):
        paths = sorted(folder.glob(f"*.{name}.txt"))
        if not paths:
            raise MoqaError(f"{folder} has no files *.{name}.txt", "give the folder of texts, one file per language")
        windows = []
        for number, path in enumerate(paths):
            data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
            own = data[: len(data) // CONTEXT * CONTEXT].view(-1, CONTEXT)
            windows.append((own, torch.full((len(own),), number)))
        found.append((torch.cat([own for own, _ in windows]), torch.cat([labels for _, labels in windows])))
    return found


_READERS = {"fashion-mnist": _fashion, "cifar10": _cifar, "text": _text}
