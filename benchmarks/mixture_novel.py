"""docs/results/mixture-novel.md: what routers of whole checkpoints do with novel texts; see `mixture_study.py`."""

from collections.abc import Sequence

from demo import ROOT
from mixture_page import (
    Row,
    against,
    all_bits,
    change,
    checkpoints,
    claim_of_checkpoints,
    mean,
    pick,
    routers,
    table,
    ways,
)

PAGE = ROOT / "docs" / "results" / "mixture-novel.md"
COUNT = 5  # variants
TEXT = """# Routers and novel texts

Command: `python benchmarks/mixture_study.py {parts}`; its rows are kept in [mixture.json](mixture.json). Setting and
variants are those of [whole checkpoints](mixture.md#whole-checkpoints): five of equal bytes, of which `all` is fitted
on wiki, python and german together, and routers that learn from 32 windows of each of these. Novel are novels, math
and french, of which neither a variant, a router nor a threshold has seen anything. All texts are test texts; 24 windows
of each, 64 tokens of which are the prompt; KL divergence in nats per token, ± half of a 95 % interval over windows.

Routers of before chose by probability alone, with a threshold from held-out windows of known texts. With 4 bits they
lost on novel texts: `linear` +4.2 ± 4.1 %, `encoder` +8.0 ± 5.0 %, `histogram` +16.3 ± 6.1 % against the best single
variant. Now confidence is probability times familiarity, and its threshold is chosen on texts that are left out of the
training in turn ([how](../methods/mixture.md)). Two rules were tried for what may be lost on left-out texts: up to the
interval of the best single variant's own loss, and up to 1 % beyond the interval of the paired differences. They choose
alike here.

{claims}

Routed is the share of prompts that do not get the variant which the router falls back to. Left out are the known texts,
each for a router that is trained on the two others, with the threshold that was chosen, over prompts of 8 to 223 tokens
of windows for routers: what the choice of the threshold was made by.

{routers}
{tables}"""


def write_novel_page(rows: Sequence[Row]) -> None:
    """Write the page, for all widths whose routers know what is familiar."""
    some = [row for row in pick(checkpoints(rows), variants=COUNT) if row["bits"] in told_bits(rows)]
    if not some:
        return
    claims, lines, tables = list[str](), list[list[str]](), list[str]()
    for bits in all_bits(some):
        mine = pick(some, bits=bits)
        for role in ("known", "novel"):
            part = pick(mine, role=role)
            claims += [claim_of_checkpoints(part, "texts", name) for name in routers(part)]
            tables.append(f"{bits:g} bits, {role} texts:\n\n{ways(part)}")
        lines += [line_of(mine, bits, name) for name in routers(mine)]
    heads = ["router", "threshold", "routed, known", "routed, novel", "known", "novel", "left out"]
    PAGE.write_text(TEXT.format(
        parts=" ".join(f"whole-{bits:g}" for bits in all_bits(some)), claims="\n".join(claims),
        routers=table(heads, lines), tables="\n".join(tables),
    ).rstrip("\n") + "\n")  # fmt: skip


def told_bits(rows: Sequence[Row]) -> set[float]:
    """Widths whose routers know what is familiar; rows of before do not say what was left out."""
    found = pick(checkpoints(rows), kind="router")
    return {row["bits"] for row in found if row.get("left_out")}


def line_of(rows: Sequence[Row], bits: float, name: str) -> list[str]:
    """A router: its threshold, how much it routes, and what that changes."""
    mine = pick(rows, kind="router", name=name)
    cells = [f"{bits:g} bits, {name}", f"{mine[0]['threshold']:g}"]
    for role in ("known", "novel"):
        # the fall-back is the variant that is fitted on all known texts
        shares = [1 - row["usage"]["all"] for row in pick(mine, role=role)]
        cells.append(f"{sum(shares) / len(shares):.0%}")
    for role in ("known", "novel"):
        single = pick(rows, kind="best-single", role=role)
        cells.append(change(*against(pick(mine, role=role), single), mean(single)))
    return [*cells, ", ".join(f"{text} {100 * lost:+.1f} %" for text, lost in mine[0]["left_out"].items())]
