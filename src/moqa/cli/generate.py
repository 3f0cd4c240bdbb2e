"""`moqa generate`: continue a text."""

import json as codec
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from moqa.cli.app import app
from moqa.errors import MoqaError

if TYPE_CHECKING:
    from moqa.generation import Sampling

OutArgument = Annotated[str, typer.Argument(metavar="OUT", help="checkpoint, or folder or Hub id of an original model")]
MaxTokensOption = Annotated[int, typer.Option("--max-tokens", help="largest number of tokens to write")]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", help="0 takes the likeliest token, 1 keeps the model's probabilities, up to 2")
]
TopPOption = Annotated[
    float, typer.Option("--top-p", help="sample from the likeliest tokens that reach this probability together")
]
TopKOption = Annotated[int, typer.Option("--top-k", help="sample from this many likeliest tokens; 0 for all")]
StopOption = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="text that ends the output and is left out; may be repeated"),
]
SamplingSeedOption = Annotated[int, typer.Option("--seed", help="the same seed gives the same text")]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="threads of each operation [default: all cores]")
]


@app.command()
def generate(
    out: OutArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="text to continue, - for stdin")],
    max_tokens: MaxTokensOption = 256,
    temperature: TemperatureOption = 1.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    stop: StopOption = None,
    seed: SamplingSeedOption = 0,
    threads: ThreadsOption = None,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object with text, counts and times")] = False,
) -> None:
    """Continue a text with a checkpoint; it is printed while it is written."""
    from moqa.generation import generate as run
    from moqa.generation import load_any

    sampling = sampling_of(max_tokens, temperature, top_p, top_k, stop, seed)
    text = _stdin() if prompt == "-" else prompt
    use_threads(threads)
    model, tokenizer = load_any(out)
    written = []
    for piece in run(model, tokenizer, text, sampling):
        written.append(piece.text)
        if not json:
            print(piece.text, end="", flush=True)
    assert piece.finish is not None
    print(codec.dumps({"text": "".join(written), **piece.finish.model_dump()}) if json else "")


def sampling_of(
    max_tokens: int, temperature: float, top_p: float, top_k: int, stop: list[str] | None, seed: int
) -> "Sampling":
    """Make a `Sampling` from the options that `generate` and `chat` share.

    Raises:
        MoqaError: if one is out of range.
    """
    from moqa.generation import Sampling

    return Sampling.of(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop=stop or (), seed=seed
    )


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
