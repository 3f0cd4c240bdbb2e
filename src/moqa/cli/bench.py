"""`moqa bench`: measure the speed of a model on this machine."""

from typing import Annotated

import typer

from moqa.cli import options
from moqa.cli.app import app
from moqa.cli.common import mib, print_table, write_result


@app.command()
def bench(
    model: options.Out,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="[default: all cores]")] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="tokens to read at once")] = 512,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="tokens to write one by one")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="measurements; the median is reported")] = 5,
    kernels: Annotated[str, typer.Option("--kernels", help="for a checkpoint: auto, native or reference")] = "auto",
    json: options.Json = None,
) -> None:
    """Measure load time, prefill and decode speed, and memory; an original runs in transformers, in bfloat16."""
    from moqa.speed import bench as run

    speed = run(
        model, threads=threads, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats, kernels=kernels
    )
    print_table(
        [f"{speed.engine}, {speed.threads} threads", "size", "load s", "prefill tok/s", "decode tok/s", "peak memory"],
        [[
            speed.model, mib(speed.bytes), f"{speed.load_seconds:.2f}", f"{speed.prefill_tokens_per_second:.0f}",
            f"{speed.decode_tokens_per_second:.1f}", mib(speed.peak_bytes),
        ]],
    )  # fmt: skip
    write_result(speed, json)
