"""HTTP routes of a server that classifies images."""

from collections.abc import Sequence

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from moqa.serve.common import common_app
from moqa.serve.images import ImageRequest, ImageService


def build_image_app(service: ImageService, keys: Sequence[str] = (), cors: Sequence[str] = ()) -> FastAPI:
    """Build the application; for its arguments see `moqa.serve.common.common_app`.

    >>> app = build_image_app(ImageService(model, reader, "out", queue=256))  # doctest: +SKIP
    """
    app = common_app(service, keys, cors)

    @app.post("/v1/classify")
    async def classify(request: Request) -> Response:
        body, pixels = await service.bodies.read(request, ImageRequest, service.read)
        return JSONResponse(await service.answer(request, body, pixels), headers=body.headers())

    return app
