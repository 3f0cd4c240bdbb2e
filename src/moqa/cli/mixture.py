"""`moqa mixture build`: make variants of a model and a router that chooses one for each prompt."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moqa.cli import options
from moqa.cli.app import App, CommandGroup, app
from moqa.cli.common import mib, print_table, say, write_result
from moqa.cli.progress import LogOption, logged, progress

if TYPE_CHECKING:
    from moqa.mixture.evaluate import MixtureEvaluation
    from moqa.mixture.record import MixtureRecord

group = App(cls=CommandGroup, no_args_is_help=True, rich_markup_mode=None)
app.add_typer(group, name="mixture", help="Make variants of a model and a router that chooses one for each prompt.")


@group.command("build")
@logged
def build(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="original model: folder or Hub id")],
    data: options.Data,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="MIX", help="mixture folder to make")],
    variants: Annotated[
        str,
        typer.Option("--variants", metavar="FILE", help="YAML file, or auto: a base and an adjustment per text"),
    ] = "auto",
    budget: Annotated[
        str | None, typer.Option("--budget", help="of each checkpoint that has none of its own, e.g. 3bpw or 12MiB")
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(
            "--router", help="linear, encoder, histogram, or se-resnet [default: linear, of images se-resnet]"
        ),
    ] = None,
    labels: Annotated[
        str, typer.Option("--labels", help="loss that it learns from: divergence from the original, or likelihood")
    ] = "divergence",
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", min=2, help="for the router: windows of 256 tokens, or images, of each [default: 64, or 1024]"
        ),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            "--measured", metavar="FOLDER", help="profile and losses, to be used again [default: MIX.measured]"
        ),
    ] = None,
    seed: int = 0,
    max_memory: options.MaxMemory = None,
    overwrite: options.Overwrite = False,
    restart: options.Restart = False,
    json: options.Json = None,
    log_json: LogOption = None,
) -> None:
    """Make a mixture: variants of a model in one folder, and a router that chooses one for each prompt or image."""
    from moqa.memory.limit import MemoryLimit
    from moqa.mixture import build_mixture

    with progress(log_json) as report:
        made = build_mixture(
            model, data, out, variants=variants, budget=budget, router=router, labels=labels, samples=samples,
            measured=measured, seed=seed, memory=MemoryLimit.parse(max_memory) if max_memory else None,
            overwrite=overwrite, restart=restart, report=report,
        )  # fmt: skip
    print_mixture(str(out), made.record)
    write_result(made.record.model_dump(mode="json"), json)


def print_mixture(name: str, record: "MixtureRecord") -> None:
    """Print a row per variant, and what the router gains."""
    router, account = record.router, record.account
    rows = [
        [
            variant, of.of or "", mib(of.bytes), *(f"{of.loss[text]:.5f}" for text in router.windows),
            f"{router.usage[variant]:.0%}" if variant in router.usage else f"no choice: {of.beaten_by} is better",
        ]
        for variant, of in record.variants.items()
    ]  # fmt: skip
    print_table(["variant", "of", "size", *router.windows, "used"], rows, f"{name}: {router.losses}")
    gain = router.single - router.oracle
    share = f", {(router.single - router.loss) / gain:.0%} of what the best choice would gain" if gain > 0 else ""
    say(
        f"router ({router.kind}): {router.loss:.5f}, best single variant ({record.default}) {router.single:.5f}, "
        f"best choice {router.oracle:.5f}{share}"
    )
    say(f"{mib(account.total)} in all, {mib(account.resident)} resident, router {account.router} bytes")


def print_mixture_evaluation(result: "MixtureEvaluation") -> None:
    """Print one row per way to answer."""
    texts = list(result.prompts)
    rows = [
        [
            f"{row.kind} {row.name}",
            *(f"{row.distributions[t].kl_divergence:.5f} ±{row.distributions[t].interval:.5f}" for t in texts),
            f"{result.mean(row.kind, row.name):.5f}",
        ]
        for row in result.rows
    ]  # fmt: skip
    sizes = f"{mib(result.bytes_total)}, {mib(result.bytes_resident)} resident"
    title = f"{result.mixture}: {sizes}; KL {f'after {result.prompt} tokens' if result.prompt else 'of images'}"
    print_table(["", *texts, "mean"], rows, title)
    usage = [
        [text, *(f"{share:.0%}" for share in shares.values()), f"{result.confidence[text]:.2f}"]
        for text, shares in result.usage.items()
    ]
    print_table(["used", *next(iter(result.usage.values())), "confidence"], usage)
    if result.recovered is not None:
        say(f"the router gains {result.recovered:.0%} of what the best choice of each prompt would gain")
