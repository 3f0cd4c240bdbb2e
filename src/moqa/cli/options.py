"""Options that several commands have; those without a help text here get it from the library, see `moqa.cli.app`."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, get_args

import typer

from moqa.cli.parse import group_size_of
from moqa.execution.registry import EXECUTORS
from moqa.exports.registry import FORMATS
from moqa.methods.registry import METHODS
from moqa.planning.engines import ENGINES
from moqa.planning.registry import STRATEGIES
from moqa.training.optimizers import OPTIMIZERS


def _among(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Completion of the names that there are."""
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def _literals(name: str) -> Callable[[], Iterable[str]]:
    def values() -> Iterable[str]:
        from moqa.planning import record

        return get_args(getattr(record, name))

    return values


Data = Annotated[
    list[str],
    typer.Option("--data", metavar="NAME=SOURCE", help="a distribution: NAME=FILE[:field], folder or Hub dataset"),
]
Samples = Annotated[int, typer.Option("--samples", min=1)]
Context = Annotated[int, typer.Option("--context", min=2)]
SelfSamples = Annotated[int | None, typer.Option("--self-samples", min=0)]
GroupSize = Annotated[int, typer.Option("--group-size", callback=group_size_of)]
Symmetric = Annotated[bool, typer.Option("--symmetric")]

Strategy = Annotated[str, typer.Option("--strategy", autocompletion=_among(lambda: STRATEGIES))]
Method = Annotated[str, typer.Option("--method", autocompletion=_among(lambda: METHODS))]
Optimizer = Annotated[str, typer.Option("--optimizer", autocompletion=_among(lambda: OPTIMIZERS))]
To = Annotated[str, typer.Option("--to", metavar="FORMAT", help="see Formats", autocompletion=_among(lambda: FORMATS))]
Ties = Annotated[str, typer.Option("--ties", autocompletion=_among(_literals("Ties")))]
EngineTies = Annotated[
    str | None,
    typer.Option(
        "--ties", autocompletion=_among(_literals("Ties")),
        help="what must share a width: unit, expert, layer_projection or layer [default: the finest of the engine]",
    ),
]  # fmt: skip
Objective = Annotated[str, typer.Option("--objective", autocompletion=_among(_literals("Objective")))]
Scope = Annotated[str, typer.Option("--scope", autocompletion=_among(_literals("Scope")))]
ServedBy = Annotated[
    str,
    typer.Option(
        "--engine", help="that will run the model: moqa, llama.cpp or vllm; sets ties and schemes",
        autocompletion=_among(lambda: ENGINES),
    ),
]  # fmt: skip
Engine = Annotated[str, typer.Option("--engine", autocompletion=_among(lambda: EXECUTORS))]
Ignore = Annotated[
    list[str] | None,
    typer.Option("--ignore", metavar="PATTERN", help="units to leave in 16 bits, e.g. '*.layers.0.*'; may be repeated"),
]
SetWidth = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATTERN=WIDTH", help="width of units, e.g. '*.down_proj=4'; may be repeated, the last counts"
    ),
]
Encodings = Annotated[str, typer.Option("--encodings")]
WidthsNested = Annotated[str | None, typer.Option("--widths-nested", metavar="WIDTHS")]
Groups = Annotated[str | None, typer.Option("--groups")]
Floor = Annotated[
    list[str] | None,
    typer.Option(
        "--floor", metavar="ROLE=WIDTH",
        help="smallest width of a role, e.g. attention=4, or none; may be repeated [default: the strategy's]",
    ),
]  # fmt: skip

Bpw = Annotated[float | None, typer.Option("--bpw", help="budget: stored bits per weight of the units")]
Size = Annotated[str | None, typer.Option("--size", help="budget: all weight files, e.g. 12MiB")]
Fit = Annotated[
    str | None,
    typer.Option("--fit", metavar="SIZE", help="budget: all memory of the served model, e.g. 8GiB; auto: free memory"),
]
Batch = Annotated[
    int | None, typer.Option("--batch", min=1, help="with --fit: conversations at the same time [default: 1]")
]

MaxMemory = Annotated[
    str | None,
    typer.Option("--max-memory", metavar="SIZE", help="memory the process may take, e.g. 4GiB [default: free memory]"),
]
TimeLimit = Annotated[
    str | None,
    typer.Option(
        "--time-limit", metavar="TIME", help="stop at the end of a layer after e.g. 90m; the same command continues"
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option("--ray-address", metavar="HOST:PORT", help="head of the Ray cluster [default: this machine's]"),
]
Overwrite = Annotated[bool, typer.Option("--overwrite")]
Restart = Annotated[bool, typer.Option("--restart")]
Json = Annotated[Path | None, typer.Option("--json", help="also write the result to this file, - for stdout")]

Out = Annotated[str, typer.Argument(metavar="OUT", help="checkpoint, or folder or Hub id of an original model")]
KvBits = Annotated[
    int | None,
    typer.Option("--kv-bits", metavar="8", help="bits of keys and values in the cache [default: as computed]"),
]
Width = Annotated[
    int | None,
    typer.Option("--width", metavar="BITS", help="of nested widths: the one to use [default: the widest]"),
]
Lora = Annotated[
    Path | None, typer.Option("--lora", metavar="DIR", help="LoRA to compute with: a folder that PEFT saved")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="largest number of tokens to write")]
_OF_THE_MODEL = "[default: the model's, else {}]"
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        help=f"0 takes the likeliest token, 1 keeps the model's probabilities, up to 2 {_OF_THE_MODEL.format(1)}",
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        help=f"sample from the likeliest tokens that reach this probability together {_OF_THE_MODEL.format(1)}",
    ),
]
TopK = Annotated[
    int | None,
    typer.Option("--top-k", help=f"sample from this many likeliest tokens; 0 for all {_OF_THE_MODEL.format(0)}"),
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="text that ends the output and is left out; may be repeated"),
]
SamplingSeed = Annotated[int, typer.Option("--seed", help="the same seed gives the same text")]
Adjustment = Annotated[
    Path | None, typer.Option("--adjustment", metavar="ADJ", help="adjustment to apply to the checkpoint")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="threads of each operation [default: all cores]")]
