"""A loaded image classifier, or a mixture of them, and the thread that answers with it."""

import asyncio
import base64
import binascii
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from starlette.requests import Request
from torch import Tensor

from moqa.data.images import ImageReader, opened
from moqa.errors import MoqaError, one_line
from moqa.mixture.load import Mixture
from moqa.mixture.route import RoutedPrompt
from moqa.serve.bodies import Bodies, unless_gone
from moqa.serve.common import check_model, check_variant
from moqa.serve.fields import AskedBody
from moqa.serve.metrics import ImageMetrics
from moqa.serve.refusal import RefusalError, stopping
from moqa.tasks import task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LARGEST_BODY = 2**24  # bytes, of which an image in base64 takes three quarters
_MOST_PIXELS = 2**26
_MOST_CLASSES = 2**16


def _number(value: Any) -> Any:
    """A form has texts only."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 9 else value


class ImageRequest(AskedBody):
    """Body of `/v1/classify`: an object of JSON, or a form."""

    model: str | None = Field(None, description="one of those that /v1/models lists")
    image: str | bytes = Field(description="a file's bytes in base64, or as a data: URL; in a form the file itself")
    top: Annotated[int, BeforeValidator(_number)] = Field(5, ge=1, le=_MOST_CLASSES, description="likeliest classes")
    variant: str | None = Field(None, description="of a mixture; null leaves the choice to the router")


class ImageService:
    """One image classifier shared by many clients; images are answered one after the other.

    >>> service = ImageService(model, reader, "out", queue=256)  # doctest: +SKIP

    Args:
        model: a classifier of transformers, e.g. from `moqa.load`; only the service's thread uses it.
        reader: makes pixels for it.
        names: names of the model in requests; the first is that of the responses.
        queue: images that may wait.
    """

    by_client = False

    def __init__(self, model: "PreTrainedModel", reader: ImageReader, names: str | Sequence[str], queue: int) -> None:
        self._model, self._reader, self._queue = model, reader, queue
        self._mixture: Mixture | None = getattr(model, "mixture", None)
        self.names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
        self.metrics, self.stopping, self._waiting = ImageMetrics(), False, 0
        self.metrics.waiting.set_function(lambda: max(self._waiting - 1, 0))
        if self._mixture is not None:
            self.metrics.route(self._mixture.names, "images")
        self.bodies = Bodies(_LARGEST_BODY, forms=True)
        self._thread = ThreadPoolExecutor(1, "moqa-model")

    @property
    def variants(self) -> Sequence[str]:
        """Variants that requests may name."""
        return self._mixture.names if self._mixture is not None else ()

    def read(self, body: ImageRequest) -> Tensor:
        """[1, channels, height, width] pixels of the image of a request.

        Raises:
            RefusalError: 400 if it cannot be read, or there is no such model or variant.
        """
        check_model(self, body.model)
        check_variant(body.variant, self.variants)
        try:
            image = opened(io.BytesIO(_file(body.image)), "the image", _MOST_PIXELS)
        except MoqaError as error:
            raise RefusalError(400, str(error), param="image", code="unreadable_image") from None
        return self._reader.pixels([image]).float()

    async def answer(self, request: Request, body: ImageRequest, pixels: Tensor) -> dict[str, Any]:
        """The classes of an image.

        Raises:
            RefusalError: 429 if too many wait, 503 if the server is stopping.
            ClientDisconnect: if the client disconnects first.
        """
        if self._waiting > self._queue:
            message = f"{self._queue} images wait: try again later"
            raise RefusalError(429, message, code="queue_full", headers={"Retry-After": "1"})
        self._waiting += 1
        try:
            work = asyncio.get_running_loop().run_in_executor(self._thread, self._classified, body, pixels)
            return await unless_gone(request, work)
        finally:
            self._waiting -= 1

    def open(self) -> None:
        """Nothing to start: the thread begins with the first image."""

    def stop(self, seconds: float) -> None:  # noqa: ARG002
        """Refuse new and waiting images; the one that is being answered takes no longer than a moment."""
        self.stopping = True

    def close(self) -> None:
        """Stop all threads."""
        self._thread.shutdown()
        self.bodies.close()

    @torch.inference_mode()
    def _classified(self, body: ImageRequest, pixels: Tensor) -> dict[str, Any]:
        if self.stopping:
            raise stopping()
        with self.metrics.seconds.time():
            model, told = self._chosen(body.variant, pixels)
            try:
                logits = task_of(model.config).call(model, pixels)[0]
            except MoqaError as error:
                raise RefusalError(400, one_line(error), param="image") from None
            shares, classes = logits.float().softmax(-1).sort(descending=True, stable=True)
        names: Any = model.config.id2label
        found = [
            {"label": str(names.get(number, number)), "probability": share}
            for number, share in zip(classes[: body.top].tolist(), shares[: body.top].tolist(), strict=True)
        ]
        return {"object": "classification", "model": self.names[0], "classes": found, **told}

    def _chosen(self, asked: str | None, pixels: Tensor) -> "tuple[PreTrainedModel, dict[str, Any]]":
        """The model that answers an image, and what the response says of it."""
        mixture, metrics = self._mixture, self.metrics
        if mixture is None:
            return self._model, {}
        route = mixture.checked(RoutedPrompt(asked) if asked is not None else mixture.choose(pixels[0]))
        metrics.count(route)
        model = mixture.use(route.variant)
        mixture.rest([route.variant])
        return model, {
            "variant": route.variant, "confidence": route.confidence, "variant_problem": route.problem,
        }  # fmt: skip


def _file(image: str | bytes) -> bytes:
    """The bytes of an image file.

    Raises:
        MoqaError: if a text is not base64.
    """
    if isinstance(image, bytes):
        return image
    text = image.partition(",")[2] if image.startswith("data:") else image
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise MoqaError("the image is not base64", "send a file's bytes in base64, or as a file of a form") from None
