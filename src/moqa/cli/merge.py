"""`moqa merge`: fine-tuned variants of one base in one folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moqa.cli import options
from moqa.cli.app import app
from moqa.cli.common import mib, print_table, say, write_result
from moqa.cli.progress import LogOption, logged, progress
from moqa.errors import MoqaError

if TYPE_CHECKING:
    from moqa.mixture.evaluate_merged import MergedEvaluation
    from moqa.mixture.merged import MergedRecord


@app.command()
@logged
def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="model that the variants were fine-tuned from")],
    variant: Annotated[
        list[str], typer.Option("--variant", metavar="NAME=MODEL", help="a fine-tuned model: folder or Hub id; repeat")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="MERGED", help="folder to make")],
    overwrite: options.Overwrite = False,
    restart: options.Restart = False,
    json: options.Json = None,
    log_json: LogOption = None,
) -> None:
    """Merge fine-tuned variants of one base: a vector for all, and a bit per weight of each."""
    from moqa.mixture.merge import merge as run
    from moqa.mixture.merged import read_merged

    variants: dict[str, str] = {}
    for text in variant:
        name, there, model = text.partition("=")
        if not there or not model or name in variants:
            raise MoqaError(f"--variant {text} is not a new NAME=MODEL", "give e.g. --variant math=FOLDER")
        variants[name] = model
    with progress(log_json) as report:
        made = run(base, variants, out, overwrite=overwrite, restart=restart, report=report)
    record = read_merged(made, verify=False)
    print_merged(str(out), record)
    write_result(record, json)


def print_merged(name: str, record: "MergedRecord") -> None:
    """Print a row per variant, and the bytes."""
    rows = [
        [variant, f"{of.distance:.4f}", f"{of.agreement:.1%}", f"{of.rescaler:.4f}", mib(of.bytes)]
        for variant, of in record.variants.items()
    ]
    print_table(["variant", "change", "signs kept", "rescaler", "masks"], rows)
    of = record.account
    say(
        f"{name}: {mib(of.total)} ({mib(of.base)} base, {mib(of.unified)} unified, {mib(of.masks)} masks), "
        f"{of.total / of.apart:.0%} of the variants apart ({mib(of.apart)})"
    )


def print_merged_evaluation(result: "MergedEvaluation") -> None:
    """Print a row per variant and distribution."""
    rows = [
        [
            row.variant, row.distribution, f"{row.merged.kl_divergence:.5f}", f"{row.base.kl_divergence:.5f}",
            *(f"{quality.perplexity:.3f}" for quality in (row.own, row.merged, row.base)),
        ]
        for row in result.rows
    ]  # fmt: skip
    title = f"{result.merged}: {mib(result.bytes)}, {result.bytes / result.apart:.0%} of the variants apart"
    headings = ["KL", "KL of the base", "perplexity of its own model", "perplexity", "of the base"]
    print_table(["variant", "distribution", *headings], rows, title)
