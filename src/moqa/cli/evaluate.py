"""`moqa evaluate`: measure the quality of a model or checkpoint on held-out text."""

from typing import TYPE_CHECKING, Annotated

import typer

from moqa.cli import options
from moqa.cli.app import app
from moqa.cli.common import mib, print_table, say, write_result
from moqa.cli.merge import print_merged_evaluation
from moqa.cli.mixture import print_mixture_evaluation
from moqa.cli.progress import LogOption, logged, progress
from moqa.errors import MoqaError

if TYPE_CHECKING:
    from moqa.evaluation import Evaluation


@app.command()
@logged
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_OUT", help="original model, checkpoint, mixture, merged variants, or GGUF file"
        ),
    ],
    data: options.Data,
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL", help="original to measure divergence from")
    ] = None,
    context: options.Context = 256,
    windows: Annotated[int, typer.Option("--windows", min=0, help="windows per distribution, 0 for all")] = 64,
    kernels: Annotated[
        str, typer.Option("--kernels", help="kernels for a checkpoint: reference, native or auto")
    ] = "reference",
    prompt: Annotated[
        int | None,
        typer.Option("--prompt", min=1, help="of a mixture: tokens of a window that the router sees [default: 64]"),
    ] = None,
    adjustment: options.Adjustment = None,
    lora: options.Lora = None,
    width: options.Width = None,
    json: options.Json = None,
    log_json: LogOption = None,
) -> None:
    """Measure perplexity, bits per byte, KL divergence and top-1 agreement of the files on disk."""
    from moqa.evaluation import evaluate as run
    from moqa.mixture.evaluate import evaluate_mixture
    from moqa.mixture.evaluate_merged import evaluate_merged
    from moqa.mixture.merged import is_merged
    from moqa.mixture.record import is_mixture

    given = {"--adjustment": adjustment is not None, "--lora": lora is not None, "--width": width is not None}
    if is_merged(model):
        more = {"--against": against is not None, "--kernels": kernels != "reference", "--prompt": prompt is not None}
        _refuse_options(f"{model} holds merged variants, which take", given | more)
        with progress(log_json) as report:
            variants = evaluate_merged(model, data, context=context, windows=windows or None, report=report)
        print_merged_evaluation(variants)
        write_result(variants, json)
        return
    if is_mixture(model):
        _refuse_options(f"{model} is a mixture, which takes", given | {"--context": context != 256})
        with progress(log_json) as report:
            measured = evaluate_mixture(
                model, data, against=against, prompt=prompt, windows=windows or None, report=report,
                kernels=kernels,
            )  # fmt: skip
        print_mixture_evaluation(measured)
        write_result(measured, json)
        return
    if prompt is not None:
        raise MoqaError(f"--prompt {prompt} is of mixtures", f"{model} is none")
    with progress(log_json) as report:
        result = run(
            model,
            data,
            against=against,
            context=context,
            windows=windows or None,
            report=report,
            kernels=kernels,
            adjustment=adjustment,
            lora=lora,
            width=width,
        )
    print_evaluation(result)
    write_result(result, json)


def _refuse_options(what: str, given: dict[str, bool]) -> None:
    for option in (name for name, typed in given.items() if typed):
        raise MoqaError(f"{what} no {option}", "leave it out")


def print_evaluation(result: "Evaluation") -> None:
    """Print one row per distribution."""

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    # text has bytes, images have labels
    images = any(q.accuracy is not None for q in result.distributions.values())
    rows = [
        [
            name, number(q.perplexity, 3), number(q.accuracy if images else q.bits_per_byte, 4),
            number(q.kl_divergence, 5), number(q.top1_agreement, 4), str(q.tokens),
        ]
        for name, q in result.distributions.items()
    ]  # fmt: skip
    title = f"{result.model}: {mib(result.bytes)}, {result.bits_per_weight:.3f} bits/weight of units"
    if result.adjustment is not None:
        title += f"; adjusted by {result.adjustment}: {100 * result.adjustment_bytes / result.bytes:+.2f} % bytes"
    if result.lora is not None:
        title += f"; with {result.lora}"
    if result.cache_bytes:
        title += f"; cache beside it: {mib(result.cache_bytes)}"
    headings = ["accuracy", "KL", "agreement", "images"] if images else ["bits/byte", "KL", "top-1", "tokens"]
    print_table(["distribution", "perplexity", *headings], rows, title)
    if result.against is None:
        say("moqa: warning: KL divergence needs the original: give --against MODEL", err=True)
