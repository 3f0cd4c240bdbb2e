"""Section on mixtures: their variants and bytes, and what their routers gain."""

from moqa.mixture.record import MixtureRecord
from moqa.reports.blocks import PageElement, Section, Table, number, percent
from moqa.reports.gather import Artifacts
from moqa.storage.paths import label

READING = (
    "A mixture answers each prompt, or image, with one of several variants of a model; a small router chooses it from "
    "that alone. Losses are means over continuations, or images, that were held out from the router's training; the "
    "best choice knows them, and no router can do better."
)


def mixtures_section(found: Artifacts) -> Section | None:
    """Section on all mixtures, and on their evaluations."""
    if not found.mixtures and not found.mixture_evaluations:
        return None
    blocks: list[PageElement] = []
    for folder, record in found.mixtures.items():
        blocks += [_variants(label(folder), record), _router(label(folder), record)]
    for result in found.mixture_evaluations:
        texts = tuple(result.prompts)
        rows = tuple(
            (
                f"{row.kind} {row.name}", *(number(row.distributions[text].kl_divergence, 5) for text in texts),
                number(result.mean(row.kind, row.name), 5),
            )
            for row in result.rows
        )  # fmt: skip
        blocks.append(Table(f"{label(result.mixture)}, measured: KL divergence", ("", *texts, "mean"), rows))
    return Section("Mixtures", "Mixtures of variants", READING, blocks)


def _variants(name: str, record: MixtureRecord) -> Table:
    texts = tuple(record.router.windows)
    rows = tuple(
        (
            variant, of.kind if of.of is None else f"adjustment of {of.of}", f"{of.bytes:,}",
            *(number(of.loss[text], 5) for text in texts),
            percent(record.router.usage.get(variant)) if of.beaten_by is None else f"never: {of.beaten_by} is better",
        )
        for variant, of in record.variants.items()
    )  # fmt: skip
    return Table(
        f"{name}: {record.router.losses}",
        ("variant", "is a", "bytes", *texts, "used"),
        rows,
        words=(0, 1),
    )


def _router(name: str, record: MixtureRecord) -> Table:
    router, account = record.router, record.account
    gain = router.single - router.oracle
    rows = (
        ("router", f"{router.kind}, {account.router:,} bytes"),
        ("best single variant", f"{record.default}: {number(router.single, 5)}"),
        ("router's choice", number(router.loss, 5)),
        ("best choice of each", number(router.oracle, 5)),
        ("share of that gain", percent((router.single - router.loss) / gain) if gain > 0 else "-"),
        ("bytes in all", f"{account.total:,}, {account.shared:,} of them stored once for several variants"),
        ("bytes resident", f"{account.resident:,}"),
    )  # fmt: skip
    return Table(f"{name}: router", ("", ""), rows, words=(0, 1))
