"""`moqa serve`: an OpenAI-style server."""

import os
from typing import Annotated

import typer

from moqa.cli import options
from moqa.cli.app import app
from moqa.cli.common import say
from moqa.cli.generate import use_threads
from moqa.errors import MoqaError

_KEYS = "MOQA_API_KEY"


@app.command()
def serve(
    out: options.Out,
    host: Annotated[str, typer.Option("--host", help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes any free port")] = 8000,
    slots: Annotated[int, typer.Option("--slots", min=1, help="texts written at the same time")] = 4,
    queue: Annotated[
        int, typer.Option("--queue", min=0, help="texts that may wait; further requests get status 429")
    ] = 256,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            envvar=_KEYS,
            help="key that clients must send (may be repeated: one for each client); visible to others in `ps`",
        ),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option("--cors", metavar="ORIGIN", help="origin of web pages that may ask (may be repeated), or *"),
    ] = None,
    adjust: Annotated[
        list[str] | None,
        typer.Option("--adjust", metavar="ADJ", help="adjustment folder (may be repeated), auto, or off"),
    ] = None,
    adjust_shared: Annotated[
        bool,
        typer.Option("--adjust-shared", help="with --adjust auto: adjust to all clients' text together, for all"),
    ] = False,
    alias: Annotated[
        list[str] | None,
        typer.Option("--alias", metavar="NAME", help="name that clients call the model by; may be repeated"),
    ] = None,
    threads: options.Threads = None,
    lora: options.Lora = None,
    kv_bits: options.KvBits = None,
    width: options.Width = None,
) -> None:
    """Answer OpenAI-style requests until Ctrl-C or SIGTERM."""
    from moqa.serve import serve as run

    # an empty variable must not open the server to everyone
    if not all(api_key or ()) or (not api_key and _KEYS in os.environ):
        raise MoqaError(f"--api-key (or {_KEYS}) is empty", "give a key, or omit the option")
    if not api_key and host not in ("127.0.0.1", "localhost", "::1"):
        say(f"moqa: warning: --host {host} without --api-key: anyone who can connect can use the model", err=True)
    given = adjust or ["off"]
    if len(given) > 1 and {"auto", "off"} & set(given):
        raise MoqaError(
            f"--adjust {' --adjust '.join(given)} cannot be combined", "give auto, off, or adjustment folders"
        )
    if adjust_shared and given != ["auto"]:
        raise MoqaError("--adjust-shared needs --adjust auto", "adjustments that are given are everyone's anyway")
    if lora is not None and given == ["auto"]:
        raise MoqaError(f"--lora {lora} --adjust auto cannot be combined", "adjustments do not know of the LoRA")
    if width is not None and given == ["auto"]:
        raise MoqaError(f"--width {width} --adjust auto cannot be combined", "adjustments are made at the widest width")
    use_threads(threads)
    run(
        out, host=host, port=port, slots=slots, queue=queue, api_keys=api_key or (), cors=cors or (),
        adjust=[] if given == ["off"] else given, adjust_shared=adjust_shared, alias=alias or (), lora=lora,
        kv_bits=kv_bits, width=width,
        ready=lambda url: say(f"moqa: {out} at {url}/v1, {slots} slots, queue of {queue}", err=True),
    )  # fmt: skip
    say("moqa: stopped", err=True)
