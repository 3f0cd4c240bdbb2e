"""`moqa serve`: load a model and serve it until a signal stops the server."""

import asyncio
import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from moqa.errors import MoqaError
from moqa.mixture.classifier import classifies, load_classifier
from moqa.mixture.load import load_any
from moqa.mixture.merged import is_merged
from moqa.mixture.record import is_mixture
from moqa.serve.adjusting import Adjusting
from moqa.serve.app import build_app
from moqa.serve.auto import AutoAdjusting
from moqa.serve.connection import ACCEPTED, Connection, Connections
from moqa.serve.image_app import build_image_app
from moqa.serve.images import ImageService
from moqa.serve.metrics import Metrics
from moqa.serve.mixture import RoutedVariants
from moqa.serve.origins import check_origins
from moqa.serve.service import Service

GRACE = 3.0  # seconds to finish texts that are being written when the server is stopped
AUTO = "auto"
_BACKLOG = 2048  # connections waiting to be accepted
_SWITCH = 0.0005  # seconds
_SPARE = 1024  # connections beside those whose texts are written or wait
_QUIET = 60.0  # seconds after a problem of connections in which no other is logged

_LOG = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn's server, which also stops the work.

    Args:
        service: a service that is open.
        connections: what limits its connections.
        keys: clients must send one of them; none lets everyone in.
        cors: origins of web pages that may ask.
    """

    def __init__(
        self, service: Service | ImageService, connections: Connections, keys: Sequence[str] = (),
        cors: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._stop = service.stop
        app = build_app(service, keys, cors) if isinstance(service, Service) else build_image_app(service, keys, cors)
        config = uvicorn.Config(
            app, http=partial(Connection, shared=connections),  # type: ignore[arg-type]
            loop="asyncio", ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
            proxy_headers=False, backlog=ACCEPTED,
            # its warnings are one line for each request that is wrong, so their number is unlimited
            log_level="error",
            # longer than clients keep connections open, so that the server never closes one just as it is used
            timeout_keep_alive=75, timeout_graceful_shutdown=int(GRACE) + 2,
        )  # fmt: skip
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept requests."""
        asyncio.get_running_loop().set_exception_handler(log_once_a_minute())
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_BACKLOG)  # uvicorn's backlog is also what the event loop accepts in one turn

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting requests; texts that are being written get a few seconds to finish."""
        self._stop(GRACE)
        await super().shutdown(sockets)


def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    slots: int = 4,
    queue: int = 256,
    api_keys: Sequence[str] = (),
    cors: Sequence[str] = (),
    adjust: Sequence[str | Path] = (),
    adjust_shared: bool = False,
    alias: Sequence[str] = (),
    lora: str | Path | None = None,
    kv_bits: int | None = None,
    width: int | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Answer OpenAI-style requests, or requests to classify images, until SIGTERM or Ctrl-C.

    >>> serve("runs/out", port=8000)  # doctest: +SKIP

    Args:
        model: folder of a checkpoint, a mixture or an original model, or a Hub id. Of an image classifier, images are
            answered one after the other, and options of texts do not apply.
        host: address to listen on.
        port: port to listen on; 0 takes any free port.
        slots: texts written at the same time.
        queue: texts that may wait; further requests get status 429.
        api_keys: clients must send one of them; none lets everyone in.
        cors: origins of web pages that may ask; `*` for all.
        adjust: adjustment folders, the first being the default for requests that name none; or only `auto`, to make
            adjustments for novel text, for each client (an API key, or a session) of its own text.
        adjust_shared: with `auto`, make adjustments of all clients' text, for all.
        alias: further names of the model; the first is that of the responses.
        lora: folder of a LoRA that the checkpoint computes with, for all requests.
        kv_bits: of keys and values in the caches of texts: 8, or None, as they are computed.
        width: of a checkpoint with nested widths, see `moqa.load`.
        ready: called with the server's address before the first request is accepted.

    Raises:
        MoqaError: if the model, an adjustment or the LoRA is missing or damaged, an origin is none, or the port is in
            use.
    """
    check_origins(cors)
    if (is_mixture(model) or is_merged(model)) and adjust:
        raise MoqaError(f"{model} is a mixture, which takes no --adjust {adjust[0]}", "its adjustments are variants")
    names = [*alias, Path(model).resolve().name]
    with _bound(host, port) as listener:
        if classifies(model):
            for option, given in (("--adjust", list(adjust)), ("--lora", lora), ("--kv-bits", kv_bits)):
                if given:
                    raise MoqaError(f"{model} is an image classifier", f"leave out {option}, which is of texts")
            service: Service | ImageService = ImageService(*load_classifier(model, width), names, queue)
        else:
            loaded, tokenizer = load_any(model, lora=lora, kv_bits=kv_bits, width=width)
            if is_mixture(model) or is_merged(model):
                adjusting: Callable[[Metrics], Adjusting] = partial(RoutedVariants, loaded.mixture)
            elif list(adjust) == [AUTO]:
                adjusting = partial(AutoAdjusting, loaded, tokenizer, model, shared=adjust_shared)
            else:
                adjusting = partial(Adjusting, loaded, folders=adjust)
            service = Service(loaded, tokenizer, names, slots, queue, adjusting)
        server = Server(service, Connections.of(slots + queue + _SPARE), api_keys, cors)

        def stop(*_: object) -> None:
            server.should_exit = True

        # uvicorn raises a signal again when it is done; the default handlers would then kill the process
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        switch = sys.getswitchinterval()
        # else looking for garbage among a request's lists goes through torch and the model as well, for a second
        gc.collect()
        gc.freeze()
        # the event loop needs the interpreter for moments, again and again, beside threads that keep it when they can
        sys.setswitchinterval(_SWITCH)
        service.open()
        try:
            with _usable(host, port):
                listener.listen(_BACKLOG)
            if ready:
                ready(f"http://{_address(listener)}")
            server.run([listener])
        finally:
            service.stop(0)
            service.close()
            gc.unfreeze()
            sys.setswitchinterval(switch)
            for number, handler in before.items():
                signal.signal(number, handler)


def log_once_a_minute() -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """Log what goes wrong with connections in one line a minute, e.g. that no more files can be opened.

    >>> asyncio.get_running_loop().set_exception_handler(log_once_a_minute())  # doctest: +SKIP
    """
    quiet_until = 0.0

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal quiet_until
        if loop.time() >= quiet_until:
            quiet_until = loop.time() + _QUIET
            error = context.get("exception")
            _LOG.error("moqa: %s: %s", context["message"], getattr(error, "strerror", None) or type(error).__name__)

    return handle


def _bound(host: str, port: int) -> socket.socket:
    """Bind a socket that does not listen yet: clients that connect while the model loads are refused at once."""
    with _usable(host, port), ExitStack() as unless_bound:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = unless_bound.enter_context(socket.socket(family, kind, protocol))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        unless_bound.pop_all()
        return listener


@contextmanager
def _usable(host: str, port: int) -> Iterator[None]:
    """Say so if an address cannot be used, e.g. because another server bound the same port and was faster."""
    try:
        yield
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MoqaError(f"cannot listen on --host {host} --port {port}", reason) from None


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
