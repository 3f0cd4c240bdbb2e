"""Image classifiers: images, each with one class."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from moqa.data import Data, Images, ImageSamples, Source, cut_images, read_images, split_images
from moqa.data.source import as_sources
from moqa.errors import MoqaError, one_line
from moqa.storage.files import values_in
from moqa.tasks.configuration import read_configuration
from moqa.tasks.task import Samples, Task, paths_in, used_through

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# names of the module lists in which families hold their stages or layers
_BLOCKS = ("stages", "layers", "layer", "blocks")
# height and width of a probe where a family takes images of any size
_SMALLEST = 32
# image processors, of all that transformers has, that make one image of each, no larger than their settings say
_PROCESSORS = (
    "Beit", "Bit", "CLIP", "ConvNext", "DeiT", "EfficientNet", "Levit", "MobileNetV1", "MobileNetV2", "MobileViT",
    "PoolFormer", "Pvt", "Segformer", "Siglip", "TextNet", "ViT",
)  # fmt: skip
# pixels of a side that any of their settings may ask for, and the smallest share of it that may be cropped out
_LARGEST, _LEAST_CROP = 2**10, 0.5


class ClassReader:
    """Turns images into pixels and class names into numbers, for the model in a folder.

    >>> ClassReader("reference/image/model", processor=None).label("airplane")
    0

    Args:
        folder: of the model; its config.json names the classes.
        processor: image processor of transformers.
    """

    def __init__(self, folder: str | Path, processor: Any) -> None:
        config = read_configuration(Path(folder))
        self._folder, self._processor = folder, processor
        classes = sorted((int(number), str(name)) for name, number in config.label2id.items())
        self._classes = {name: number for number, name in classes}

    def pixels(self, images: list[Any]) -> Tensor:
        """[images, channels, height, width] pixels of opened images.

        Raises:
            MoqaError: if the processor fails, or makes something else.
        """
        try:
            with np.errstate(all="ignore"):  # said below, in one line
                pixels = self._processor(images=images, return_tensors="pt")["pixel_values"]
        except Exception as error:  # settings of the folder may be anything
            raise MoqaError(f"the image processor of {self._folder} fails", one_line(error)) from None
        if pixels.dim() != 4:
            what = f"the image processor of {self._folder} makes pixels of shape {list(pixels.shape)}"
            raise MoqaError(what, "[images, channels, height, width] are needed")
        if not pixels.isfinite().all():
            what = f"the image processor of {self._folder} makes NaN or infinite pixels"
            raise MoqaError(what, "look at its rescale_factor, image_mean and image_std")
        return pixels

    def label(self, name: str) -> int:
        """Number of a class, from its name or from the number itself."""
        if name in self._classes:
            return self._classes[name]
        if name.isdecimal() and int(name) in self._classes.values():
            return int(name)
        names = list(self._classes)
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        raise MoqaError(f"{name} is not a class of {self._folder}", f"its {len(names)} classes are {shown}")


class ImageClassification(Task):
    """See `Task`."""

    name, kind = "image_classification", "image classifier"
    batch_size, batch_dims = 32, 1
    predicts_each, writes_samples = False, False
    used_by = used_through(
        "AutoModelForImageClassification", "`moqa evaluate FOLDER_OR_ID --data NAME=FOLDER` scores it"
    )

    def accepts(self, config: "PretrainedConfig") -> bool:
        """See `Task`."""
        from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

        return type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    def auto_class(self, config: "PretrainedConfig") -> Any:  # noqa: ARG002
        """See `Task`."""
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification

    def blocks(self, model: nn.Module) -> list[str]:
        """Stages of a convolutional network, or layers of an encoder: the outermost module list with a usual name."""
        found = [
            (path.count("."), _BLOCKS.index(path.rpartition(".")[2]), module)
            for path, module in model.named_modules()
            if path.rpartition(".")[2] in _BLOCKS and isinstance(module, nn.ModuleList) and len(module)
        ]
        if not found:
            names = ", ".join(_BLOCKS)
            raise MoqaError(f"{type(model).__name__} has no blocks", f"looked for lists of modules named {names}")
        return paths_in(model, min(found, key=lambda entry: entry[:2])[2])

    def ends(self, model: "PreTrainedModel") -> list[Any]:  # noqa: ARG002
        """None: what comes before and after the blocks is small."""
        return []

    def depth(self, config: "PretrainedConfig") -> int:
        """See `Task`."""
        depths = getattr(config, "depths", None)
        return len(depths) if depths else int(config.num_hidden_layers)

    def probe(self, model: nn.Module) -> Tensor:
        """One image."""
        return torch.zeros(1, *_shape(model))

    def call(self, model: nn.Module, batch: Tensor) -> Tensor:
        """[batch, channels, height, width] pixels -> [batch, classes]."""
        try:
            return model(batch).logits
        except ValueError as error:  # of transformers, for another size than the model's
            raise MoqaError("the image processor does not fit the model", one_line(error)) from None

    def scored(self, logits: Tensor) -> Tensor:
        """Logits of all images."""
        return logits

    def targets(self, samples: Samples) -> Iterator[Tensor]:
        """Classes of the images."""
        assert isinstance(samples, ImageSamples)
        return iter(samples.labels.split(self.batch_size))

    def processor(self, folder: str | Path) -> Any:
        """transformers' image processor."""
        from transformers import AutoImageProcessor

        try:
            found = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        except ImportError:
            raise MoqaError("images need the package pillow", "pip install 'moqa[image]'") from None
        except Exception as error:  # transformers raises many kinds of errors here
            raise MoqaError(f"{folder} has no image processor that transformers can read", one_line(error)) from None
        _check_processor(folder, found)
        return found

    def reader(self, folder: str | Path) -> "ClassReader":
        """See `ClassReader`."""
        return ClassReader(folder, self.processor(folder))

    def sources(self, data: Data, reader: Any) -> list[Source]:  # noqa: ARG002
        """Folders of images by class, see `moqa.data.read_images`."""
        return as_sources(data, read_images)

    def split(self, source: Source) -> tuple[Source, Source]:
        """See `moqa.data.split_images`."""
        return split_images(_images(source))

    def context(self, context: int) -> int:  # noqa: ARG002
        """Predictions of an image: one."""
        return 1

    def cut(
        self, source: Source, reader: Any, context: int, count: int | None = None, seed: int = 0  # noqa: ARG002
    ) -> ImageSamples:  # fmt: skip
        """See `moqa.data.cut_images`."""
        return cut_images(_images(source), reader, count, seed)


def _images(source: Source) -> Images:
    if not isinstance(source, Images):
        raise MoqaError(f"{source.name}={source.origin} holds text", "an image classifier reads folders of images")
    return source


def _shape(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of an image that the model takes."""
    config: Any = model.config
    return config.num_channels, *_size(config)


def _size(config: Any) -> tuple[int, int]:
    """Height and width of an image, as far as the family has them in its configuration."""
    size = config.image_size if hasattr(type(config), "image_size") else None
    height, width = size if isinstance(size, list | tuple) else (size or _SMALLEST,) * 2
    return height, width


def _check_processor(folder: str | Path, processor: Any) -> None:
    """Refuse settings that cost more than any model's: a few digits in a file can ask for images of any size."""
    kind = type(processor).__name__.removesuffix("Pil").removesuffix("ImageProcessor")
    if kind not in _PROCESSORS:
        raise MoqaError(f"the image processor of {folder} is of type {kind}", f"moqa knows {', '.join(_PROCESSORS)}")
    most = max(_LARGEST, 2 * max(_size(read_configuration(Path(folder)))))
    for key, value, _ in values_in(json.loads(processor.to_json_string())):
        least = _LEAST_CROP if key == "crop_pct" else -most
        if isinstance(value, int | float) and not least <= value <= most:
            what = f"the image processor of {folder} has {key} {value}"
            raise MoqaError(what, f"moqa takes {least} to {most}, so many pixels a side")
