"""`moqa generate`: continue a text."""

import json as codec
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from moqa.cli import options
from moqa.cli.app import app
from moqa.cli.common import shown
from moqa.errors import MoqaError

if TYPE_CHECKING:
    from moqa.generation import Sampling


@app.command()
def generate(
    out: options.Out,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="text to continue, - for stdin")],
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    stop: options.Stop = None,
    seed: options.SamplingSeed = 0,
    adjustment: options.Adjustment = None,
    variant: Annotated[
        str | None, typer.Option("--variant", metavar="NAME", help="of a mixture [default: the router's choice]")
    ] = None,
    threads: options.Threads = None,
    lora: options.Lora = None,
    kv_bits: options.KvBits = None,
    width: options.Width = None,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object with text, counts and times")] = False,
) -> None:
    """Continue a text with a checkpoint; it is printed while it is written."""
    from moqa.generation import encode
    from moqa.mixture.generate import continued, route_of
    from moqa.mixture.load import load_any

    sampling = sampling_of(max_tokens, temperature, top_p, top_k, stop, seed)
    text = _stdin() if prompt == "-" else prompt
    use_threads(threads)
    model, tokenizer = load_any(out, adjustment, lora, kv_bits, width)
    ids = encode(tokenizer, text)
    route = route_of(model, ids, variant)
    written = []
    for piece in continued(model, tokenizer, ids, sampling, route):
        written.append(piece.text)
        if not json:
            print(shown(piece.text), end="", flush=True)
    assert piece.finish is not None
    about = {} if route is None else {"variant": route.variant, "confidence": route.confidence}
    print(codec.dumps({"text": "".join(written), **piece.finish.model_dump(), **about}) if json else "")


def sampling_of(
    max_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    stop: list[str] | None,
    seed: int,
) -> "Sampling":
    """Make a `Sampling` from the options that `generate` and `chat` share; what is None is left to the model.

    Raises:
        MoqaError: if one is out of range.
    """
    from moqa.generation import Sampling

    options = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given = {name: value for name, value in options.items() if value is not None}
    return Sampling.of(max_tokens=max_tokens, stop=stop or (), seed=seed, **given)


def use_threads(threads: int | None) -> None:
    """Apply `--threads`, if given."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise MoqaError("the prompt on stdin is not UTF-8", error.reason) from None
