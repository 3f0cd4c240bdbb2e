"""What several commands share: options, tables, output for machines."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from moqa.errors import MoqaError
from moqa.storage.artifact import write_json

_BEGAN = time.perf_counter()

DataOption = Annotated[
    list[str],
    typer.Option("--data", metavar="NAME=SOURCE", help="a distribution: NAME=FILE[:field], folder or Hub dataset"),
]
BpwOption = Annotated[float | None, typer.Option("--bpw", help="budget: stored bits per weight of the units")]
SizeOption = Annotated[str | None, typer.Option("--size", help="budget: all weight files, e.g. 12MiB")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="also write the result to this file, - for stdout")]
SeedOption = Annotated[int, typer.Option("--seed", help="of samples, labels, self-written text and random plans")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="replace an output of moqa that is there")]
StrategyOption = Annotated[
    str, typer.Option("--strategy", help="moqa-budget, moqa, moqa-v1, frequency, uniform or random")
]
TiesOption = Annotated[
    str, typer.Option("--ties", help="what must share a width: unit, expert, layer_projection or layer")
]
HedgeOption = Annotated[
    float | None, typer.Option("--hedge", help="moqa-budget: share of the model's own text in the objective, 0 to 1")
]
ObjectiveOption = Annotated[
    str, typer.Option("--objective", help="moqa-budget: mean or minimax over the known distributions")
]
ScopeOption = Annotated[
    str, typer.Option("--scope", help="moqa: cluster experts over all layers (global) or per layer")
]
WidthsOption = Annotated[str, typer.Option("--widths", help="candidate widths, comma-separated")]
MethodOption = Annotated[str, typer.Option("--method", help="gptq or rtn")]
SamplesOption = Annotated[int, typer.Option("--samples", min=1, help="windows per distribution to measure")]
ContextOption = Annotated[int, typer.Option("--context", min=2, help="tokens in a window")]
SelfSamplesOption = Annotated[
    int | None, typer.Option("--self-samples", min=0, help="windows the model writes itself [default: as --samples]")
]
SensitivityOption = Annotated[
    bool,
    typer.Option("--no-sensitivity", help="measure none, which uniform plans and moqa-v1 do not need"),
]
GroupOption = Annotated[int, typer.Option("--group-size", min=8, help="weights that share a scale")]
SymmetricOption = Annotated[bool, typer.Option("--symmetric", help="grids without a zero-point")]
EngineOption = Annotated[
    str, typer.Option("--engine", help="where the work is done: local, or ray for the machines of a cluster")
]
AddressOption = Annotated[
    str | None,
    typer.Option("--ray-address", metavar="HOST:PORT", help="head of the Ray cluster [default: this machine's]"),
]

console = Console(stderr=True)


def write_result(result: BaseModel | dict, path: Path | None) -> None:
    """Write a result for machines, if asked for."""
    if path is None:
        return
    if str(path) == "-":
        data = result.model_dump(mode="json") if isinstance(result, BaseModel) else result
        print(json.dumps(data, indent=1, sort_keys=True))
    else:
        write_json(result, path)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table on stdout; the first column is text, all others are numbers."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    # a pipe gets whole lines, however wide the table is
    width = None if sys.stdout.isatty() else 200
    Console(width=width).print(table)


def mib(size: int) -> str:
    """Bytes in MiB."""
    return f"{size / 2**20:.2f} MiB"


def widths_of(text: str) -> tuple[int, ...]:
    """Widths from `--widths`.

    Raises:
        MoqaError: if they are no numbers.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise MoqaError(f"--widths {text} are no widths", "give e.g. --widths 2,3,4") from None


def start_and_end() -> float:
    """Seconds that a command takes beside its work, told when it has started: to end, it takes a quarter as long."""
    return 1.25 * (time.perf_counter() - _BEGAN)
