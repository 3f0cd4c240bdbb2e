"""`moqa serve`: an OpenAI-style server."""

from typing import Annotated

import typer

from moqa.cli import options
from moqa.cli.app import app
from moqa.cli.common import say
from moqa.cli.generate import use_threads
from moqa.errors import MoqaError


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
        str | None,
        typer.Option("--api-key", envvar="MOQA_API_KEY", help="key that clients must send; visible to others in `ps`"),
    ] = None,
    adjust: Annotated[
        list[str] | None,
        typer.Option("--adjust", metavar="ADJ", help="adjustment folder (may be repeated), auto, or off"),
    ] = None,
    threads: options.Threads = None,
) -> None:
    """Answer OpenAI-style requests until Ctrl-C or SIGTERM."""
    from moqa.serve import serve as run

    if api_key == "":
        raise MoqaError("--api-key (or MOQA_API_KEY) is empty", "give a key, or omit the option")
    if api_key is None and host not in ("127.0.0.1", "localhost", "::1"):
        say(f"moqa: warning: --host {host} without --api-key: anyone who can connect can use the model", err=True)
    given = adjust or ["off"]
    if len(given) > 1 and {"auto", "off"} & set(given):
        raise MoqaError(
            f"--adjust {' --adjust '.join(given)} cannot be combined", "give auto, off, or adjustment folders"
        )
    use_threads(threads)
    run(
        out, host=host, port=port, slots=slots, queue=queue, api_key=api_key, adjust=[] if given == ["off"] else given,
        ready=lambda url: say(f"moqa: {out} at {url}/v1, {slots} slots, queue of {queue}", err=True),
    )  # fmt: skip
    say("moqa: stopped", err=True)
