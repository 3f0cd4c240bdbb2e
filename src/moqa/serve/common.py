"""What every server answers, whatever its model is for: health, metrics, the model's names, and refusals."""

from collections.abc import Sequence
from typing import Protocol

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from moqa.errors import MoqaError
from moqa.serve.guard import Guard
from moqa.serve.metrics import RequestMetrics
from moqa.serve.refusal import RefusalError, refusal_of
from moqa.serve.sessions import Sessions


class Served(Protocol):
    """A model that is served."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the model in requests; the first is that of the responses."""

    @property
    def metrics(self) -> RequestMetrics:
        """Metrics of the server."""

    @property
    def stopping(self) -> bool:
        """Whether new requests are refused because the server stops."""

    @property
    def by_client(self) -> bool:
        """Whether clients have to be told apart."""

    def open(self) -> None:
        """Start to work."""

    def stop(self, seconds: float) -> None:
        """Refuse what is new or waits, and end what is unfinished after some seconds; returns at once."""

    def close(self) -> None:
        """Stop all threads, once it has stopped."""


def common_app(service: Served, keys: Sequence[str] = (), cors: Sequence[str] = ()) -> FastAPI:
    """An application with the routes that all models have.

    >>> app = common_app(service)  # doctest: +SKIP

    Args:
        service: the model.
        keys: clients must send one of them; none for no key.
        cors: origins of web pages that may ask; `*` for all.
    """
    app = FastAPI(title="moqa", openapi_url=None)
    if service.by_client and not keys:
        app.add_middleware(Sessions)
    app.add_middleware(Guard, metrics=service.metrics, keys=keys, cors=cors)
    if cors:
        # outermost: a browser asks whether it may ask without the key
        app.add_middleware(
            CORSMiddleware, allow_origins=cors, allow_methods=("GET", "POST"), allow_headers=("*",),
            expose_headers=("*",), allow_private_network=True,
        )  # fmt: skip
    for kind in (HTTPException, MoqaError):
        app.add_exception_handler(kind, _refused)
    listed = {name: {"id": name, "object": "model", "created": 0, "owned_by": "moqa"} for name in service.names}

    @app.get("/health")
    async def health() -> Response:
        stopping = service.stopping
        return JSONResponse({"status": "stopping" if stopping else "ok"}, 503 if stopping else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": list(listed.values())})

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> Response:
        check_model(service, name)
        return JSONResponse(listed[name])

    return app


def check_model(service: Served, name: str | None) -> None:
    """Check the model that a request names.

    Raises:
        RefusalError: 404 if it is not this one.
    """
    if name is not None and name not in service.names:
        known = " or ".join(service.names)
        raise RefusalError(404, f"no such model: the only one is {known}", param="model", code="model_not_found")


def check_variant(name: str | None, known: Sequence[str]) -> None:
    """Check the variant that a request names.

    Raises:
        RefusalError: 400 if the server has none of that name.
    """
    if name is not None and name not in known:
        raise RefusalError(
            400, f"no such variant: the server has {', '.join(known) or 'none'}", param="variant",
            code="variant_not_found",
        )  # fmt: skip


async def _refused(_: Request, error: Exception) -> Response:
    return refusal_of(error).response()
