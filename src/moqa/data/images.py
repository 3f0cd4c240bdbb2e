"""Images: folders with one folder for each class, and the samples that a model reads."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np

from moqa.data.spacing import evenly_spaced
from moqa.errors import MoqaError, one_line

if TYPE_CHECKING:
    from torch import Tensor

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
# images that are decoded at a time
_BATCH = 64
# first bytes of each file that enter the digest
_DIGEST_BYTES = 4096


@dataclass(frozen=True)
class Images:
    """A named source of images, each with a class.

    Attributes:
        name: of the distribution.
        files: each file with the name of its class, in order.
        origin: what the user typed after NAME=.
    """

    name: str
    files: tuple[tuple[Path, str], ...]
    origin: str

    @property
    def digest(self) -> str:
        """Hash that identifies the images: of the class, size and first bytes of every file."""
        digest = hashlib.sha256()
        for path, label in self.files:
            with path.open("rb") as file:
                digest.update(f"{label} {path.stat().st_size}\n".encode() + file.read(_DIGEST_BYTES))
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class ImageSamples:
    """Images as a model reads them.

    Attributes:
        name: of the distribution.
        inputs: [images, channels, height, width] pixels from the image processor, float32.
        labels: [images] class, int64.
        hashes: [hashes] uint64, sorted and unique: content hashes of the images before they are resized.
    """

    name: str
    inputs: Tensor
    labels: Tensor
    hashes: np.ndarray


class ImageReader(Protocol):
    """Makes pixels and class numbers for one model, see `moqa.tasks.image_classification.ClassReader`."""

    def pixels(self, images: list[Any]) -> Tensor:
        """[images, channels, height, width] pixels of opened images."""

    def label(self, name: str) -> int:
        """Number of the class with a name.

        Raises:
            MoqaError: if the model has no such class.
        """


def read_images(spec: str) -> Images:
    """List the images of a folder that holds one folder for each class.

    >>> read_images("test=reference/image/test").files[0]
    (PosixPath('reference/image/test/airplane/00003.png'), 'airplane')

    Args:
        spec: NAME=FOLDER; folders in it are named as the model names its classes, or by their numbers.

    Raises:
        MoqaError: if it is not such a folder, or an image is outside the folders of classes.
    """
    name, source = name_and_source(spec, "NAME=FOLDER", "test=images/test")
    folder = Path(source).expanduser()
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise MoqaError(
            f"{spec}: {folder} {problem}", "an image classifier reads a folder with one folder for each class"
        )
    loose = next((path for path in sorted(folder.iterdir()) if is_image(path)), None)
    if loose is not None:
        raise MoqaError(f"{spec}: {loose} has no label", f"put it into a folder named as its class, {folder}/CLASS")
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = tuple((path, label.name) for label in classes for path in sorted(label.rglob("*")) if is_image(path))
    if not files:
        kinds = ", ".join(sorted(_SUFFIXES))
        raise MoqaError(f"{spec} holds no image", f"give a folder with one folder of {kinds} for each class")
    return Images(name, files, source)


def cut_images(images: Images, reader: ImageReader, count: int | None = None, seed: int = 0) -> ImageSamples:
    """Read images in the form that a model takes, evenly spaced over all classes.

    >>> from moqa.tasks import find_task
    >>> reader = find_task("image_classification").reader("reference/image/model")
    >>> cut_images(read_images("test=reference/image/test"), reader, count=3).inputs.shape
    torch.Size([3, 3, 64, 64])

    Args:
        images: files and classes.
        reader: of the model.
        count: number of images to take; all of them if None or more than there are.
        seed: shifts which images are taken.

    Raises:
        MoqaError: if an image cannot be read, the model does not have its class, or the images have several sizes for
            the model.
    """
    import torch

    if count is not None and count < 1:
        raise MoqaError(f"{count} images of {images.name} leave nothing to read", "take 1 or more")
    available = len(images.files)
    chosen = evenly_spaced(available, available if count is None else min(count, available), seed)
    files = [images.files[index] for index in chosen]
    labels = [_label(images, reader, label) for _, label in files]
    pixels, hashes = [], []
    for begin in range(0, len(files), _BATCH):
        opened = [_open(images, path) for path, _ in files[begin : begin + _BATCH]]
        hashes += [_content_hash(image) for image in opened]
        pixels.append(reader.pixels(opened))
    sizes = sorted({tuple(some.shape[1:]) for some in pixels})
    if len(sizes) > 1:
        what = f"{images.name}={images.origin}: images become pixels of shapes {sizes[0]} and {sizes[1]}"
        raise MoqaError(what, "make them of one size, or use an image processor that does")
    return ImageSamples(
        images.name, torch.cat(pixels).float(), torch.tensor(labels), np.unique(np.array(hashes, np.uint64))
    )


def split_images(images: Images, share: float = 0.2) -> tuple[Images, Images]:
    """Hold out a share of the images, evenly spaced over all classes.

    >>> calibration, held_out = split_images(read_images("test=reference/image/test"))
    >>> len(held_out.files) / len(calibration.files)
    0.25

    Raises:
        MoqaError: if either split would hold no image.
    """
    held = round(len(images.files) * share)
    if not 0 < held < len(images.files):
        raise MoqaError(
            f"{images.name}={images.origin} has too few images to hold out {share:.0%}",
            f"it has {len(images.files)}: give more, or a separate folder for evaluation",
        )
    out = set(evenly_spaced(len(images.files), held, 0).tolist())
    sides = [tuple(f for n, f in enumerate(images.files) if (n in out) == held_out) for held_out in (False, True)]
    return replace(images, files=sides[0]), replace(images, files=sides[1])


def name_and_source(spec: str, form: str, example: str) -> tuple[str, str]:
    """The two parts of NAME=SOURCE.

    Args:
        spec: as the user typed it.
        form: what it should look like, for the message.
        example: of that form.

    Raises:
        MoqaError: if there are no two parts, or the name has other characters than names of files should have.
    """
    name, equals, source = spec.partition("=")
    if not equals or not source:
        raise MoqaError(f"'{spec}' is not {form}", f"give for example {example}")
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise MoqaError(f"'{name}' in '{spec}' is not a name", "use letters, digits, '_', '.' and '-'")
    return name, source


def opened(file: Path | BinaryIO, what: str, most_pixels: int | None = None) -> Any:
    """An image in RGB, decoded.

    >>> opened(Path("reference/image/test/airplane/00003.png"), "an airplane").size
    (32, 32)

    Args:
        file: path, or an open file.
        what: the image, in messages.
        most_pixels: of an image that is decoded at all; None takes any.

    Raises:
        MoqaError: if it cannot be read, or is larger.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MoqaError("images need the package pillow", "pip install 'moqa[image]'") from None
    try:
        with Image.open(file) as image:
            width, height = image.size
            if most_pixels is None or width * height <= most_pixels:
                return image.convert("RGB")
    except Exception as error:  # decoders raise many kinds of errors for damaged files
        why = "of no kind that pillow knows" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise MoqaError(f"{what} cannot be read as an image", why) from None
    raise MoqaError(f"{what} has {width} x {height} pixels", f"give one of at most {most_pixels:,}")


def is_image(path: Path) -> bool:
    """Whether a file is an image by its name."""
    return path.suffix.lower() in _SUFFIXES and path.is_file()


def _label(images: Images, reader: ImageReader, label: str) -> int:
    try:
        return reader.label(label)
    except MoqaError as error:
        raise MoqaError(f"{images.name}={images.origin}: {error}") from None


def _open(images: Images, path: Path) -> Any:
    return opened(path, f"{images.name}={images.origin}: {path}")


def _content_hash(image: Any) -> int:
    """Hash of the decoded pixels: the same for lossless copies in other file formats."""
    digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()
    return int.from_bytes(digest[:8], "little")
