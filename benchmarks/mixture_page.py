"""docs/results/mixture.md and its pictures, from the summary of `mixture_study.py`."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from demo import KNOWN, NOVEL, ROOT
from mixture_texts import BEFORE, ENDING, IMAGES, PLANES, TEXT, WHOLE

PAGE = ROOT / "docs" / "results" / "mixture.md"
SUMMARY = ROOT / "runs" / "mixture" / "summary.json"
ALL = (*KNOWN, *NOVEL)
Row = dict[str, Any]
KINDS = ("best-single", "uniform-routing", "ensemble", "router", "always-right", "oracle")
SHOWN = ("original", "variant", *KINDS, "same-bytes")
COLOURS = {
    "variant": "#c9c9c9", "best-single": "#8c8c8c", "uniform-routing": "#d8b26e", "ensemble": "#b58ac9",
    "router": "#1f6fb4", "always-right": "#7fb2dd", "oracle": "#2e8b57",
}  # fmt: skip


def pick(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def mean(rows: Sequence[Row], key: str = "kl_divergence") -> float:
    return sum(row[key] for row in rows) / len(rows)


def half(rows: Sequence[Row]) -> float:
    """Half of the 95 % interval of a mean over texts, from those of the texts."""
    return math.sqrt(sum(row["interval"] ** 2 for row in rows)) / len(rows)


def against(ours: Sequence[Row], theirs: Sequence[Row]) -> tuple[float, float]:
    """Mean of the paired differences per prompt, over texts, and half of its 95 % interval."""
    total, spread = 0.0, 0.0
    for one in ours:
        other = next(row for row in theirs if row["distribution"] == one["distribution"])
        gaps = [a - b for a, b in zip(one["per_input"], other["per_input"], strict=True)]
        middle = sum(gaps) / len(gaps)
        total += middle / len(ours)
        spread += sum((g - middle) ** 2 for g in gaps) / (len(gaps) - 1) / len(gaps) / len(ours) ** 2
    return total, 1.96 * math.sqrt(spread)


def share(rows: Sequence[Row], router: str) -> float | None:
    """Share of (oracle - best single) that a router recovers."""
    single, oracle = mean(pick(rows, kind="best-single")), mean(pick(rows, kind="oracle"))
    found = pick(rows, kind="router", name=router)
    return (single - mean(found)) / (single - oracle) if found and single > oracle else None


def nats(value: float, around: float | None = None) -> str:
    """A loss, and half of its interval."""
    form = ".5f" if value >= 0.001 or not value else ".2e"
    return f"{value:{form}}" if around is None else f"{value:{form}} ± {around:{form}}"


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    text = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    return "\n".join([*text, *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"


def ways(rows: Sequence[Row]) -> str:
    """One line per way to answer, with each text."""
    texts = list(dict.fromkeys(row["distribution"] for row in rows))
    single = pick(rows, kind="best-single")
    lines = []
    for kind in SHOWN:
        for name in dict.fromkeys(row["name"] for row in pick(rows, kind=kind)):
            some = pick(rows, kind=kind, name=name)
            gap, around = against(some, single)
            cells = [nats(next(r for r in some if r["distribution"] == t)["kl_divergence"]) for t in texts]
            words = [] if some[0]["perplexity"] is None else [f"{mean(some, 'perplexity'):.3f}"]
            lines.append([
                f"{kind} {name}", *cells, nats(mean(some), half(some)),
                change(gap, around, mean(single)), *words, f"{mean(some, 'top1'):.4f}",
            ])  # fmt: skip
    words = [] if rows[0]["perplexity"] is None else ["mean ppl"]
    return table(["", *texts, "mean KL", "against best single", *words, "top-1"], lines)


def usage(rows: Sequence[Row], name: str) -> str:
    some = pick(rows, kind="router", name=name)
    variants = list(some[0]["usage"])
    return table(
        [f"router {name}", *variants],
        [[row["distribution"], *(f"{row['usage'][v]:.0%}" for v in variants)] for row in some],
    )


def all_routers(rows: Sequence[Row], latency: dict[str, Any]) -> str:
    """Routers among the same variants: what each takes, and what it recovers."""
    times, base, lines = latency["64"], pick(rows, kind="variant", name="base"), []
    for name in (name for name in routers(rows) if "likelihood" not in name):
        some, spent = pick(rows, kind="router", name=name), times.get(name)
        lines.append([
            name, f"{some[0]['router_bytes']:,}", "-" if spent is None else f"{spent / 1000:.2f}",
            "-" if spent is None else f"{spent / times['answer']:.1%}", f"{1 - mean(some) / mean(base):.1%}",
            f"{share(rows, name):.0%}",
        ])  # fmt: skip
    heads = ["router", "bytes", "ms of a route", "of reading 64 and writing 32", "below the base", "recovered"]
    return (
        "All three choose alike where it matters; which variant a wiki or a novel gets makes little difference.\n"
        "`histogram` reads the prompt once more and counts the experts of each block on the way: small, and not free."
        f"\n\n{table(heads, lines)}"
    )


def counts(rows: Sequence[Row], role: str, name: str = "linear") -> str:
    """Means over the distributions of a role, by bits and number of variants."""
    lines = []
    for bits in sorted({row["bits"] for row in rows}, reverse=True):
        for count in sorted({row["variants"] for row in pick(rows, bits=bits)}):
            some = pick(rows, bits=bits, variants=count, role=role)
            single, router = pick(some, kind="best-single"), pick(some, kind="router", name=name)
            if not router:
                continue
            gap, around = against(router, single)
            found = share(some, name)
            lines.append([
                f"{bits:g}, {count}", *(nats(mean(pick(some, kind=kind))) for kind in KINDS[:3]),
                nats(mean(router)), nats(mean(pick(some, kind="oracle"))), change(gap, around, mean(single)),
                "-" if found is None else f"{found:.0%}",
            ])  # fmt: skip
    names = ["bits, variants", "best single", "uniform routing", "ensemble", f"router ({name})", "oracle"]
    return table([*names, "router against best single", "recovered"], lines)


def bars(groups: Sequence[tuple[str, Sequence[Row]]], router: str) -> str:
    """A group of bars for each set of rows: mean KL of all ways to answer."""
    width, height, left, parts = 90, 220, 60, list[str]()
    top = max(mean(pick(rows, kind=k)) for _, rows in groups for k in ("uniform-routing", "best-single"))
    place = left
    for title, rows in groups:
        begin = place
        for kind in KINDS:
            some = pick(rows, kind=kind) if kind != "router" else pick(rows, kind=kind, name=router)
            if not some:
                continue
            value, around = mean(some), half(some)
            y, end = height - 180 * value / top, 180 * around / top
            parts.append(f'<rect x="{place}" y="{y:.1f}" width="13" height="{height - y:.1f}" fill="{COLOURS[kind]}"/>')
            parts.append(
                f'<line x1="{place + 6.5}" x2="{place + 6.5}" y1="{y - end:.1f}" y2="{y + end:.1f}" stroke="#333"/>'
            )
            place += 15
        parts.append(f'<text x="{(begin + place) / 2}" y="{height + 16}" text-anchor="middle">{title}</text>')
        place += width - 60
    for number, kind in enumerate(kind for kind in KINDS if any(pick(rows, kind=kind) for _, rows in groups)):
        x, y = left + 130 * (number % 4), height + 36 + 16 * (number // 4)
        parts.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{COLOURS[kind]}"/>')
        parts.append(f'<text x="{x + 14}" y="{y}">{kind}</text>')
    for tick in (0.0, 0.5, 1.0):
        y = height - 180 * tick
        parts.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{top * tick:.4f}</text>')
        parts.append(f'<path d="M{left} {y:.0f}H{place}" stroke="#ddd"/>')
    box = f'viewBox="0 0 {max(place, 600)} {height + 64}" font-family="sans-serif" font-size="11"'
    back = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{back}{"".join(parts)}</svg>\n'


def change(gap: float, around: float, base: float) -> str:
    return f"{100 * gap / base:+.1f} ± {100 * around / base:.1f} %"


def line(text: str, holds: bool) -> str:
    return f"- {'holds' if holds else 'MISS '} {text}"


def claims(summary: dict[str, Any]) -> list[str]:
    """What was wanted, each line computed."""
    rows, found = summary["rows"], list[str]()
    for bits in all_bits(adjustments(rows)):
        found += _claims_of_adjustments(all_of(adjustments(rows), bits), bits)
    for what, whole in (("texts", checkpoints(rows)), ("images", of_images(rows))):
        for bits in all_bits(whole):
            for role in ("known", "novel"):
                some = pick(whole, bits=bits, variants=5, role=role)
                found += [claim_of_checkpoints(some, what, name) for name in routers(some)]
    for length, times in summary["latency"].items():
        if "se-resnet" in times:
            spent = times["se-resnet"] / times["answer"]
            text = f"a route of {length} takes {times['se-resnet'] / 1000:.2f} ms: {spent:.1%} of answering"
            found.append(line(f"{text}; wanted 5 %", spent <= 0.05))
            continue
        spent, alone = times["encoder"] / times["answer"], times["encoder"] / times["prompt"]
        text = (
            f"a route by the encoder takes {times['encoder'] / 1000:.2f} ms: {spent:.1%} of reading {length} tokens "
            f"and writing 32, {alone:.1%} of reading alone"
        )
        found.append(line(f"{text}; wanted 5 %", spent <= 0.05))
    return found


def claim_of_checkpoints(rows: Sequence[Row], what: str, name: str) -> str:
    """What a router recovers, and whether it loses."""
    single = pick(rows, kind="best-single")
    gap, around = against(pick(rows, kind="router", name=name), single)
    part = share(rows, name)
    gained = "-" if part is None else f"{part:.0%}"
    text = (
        f"5 checkpoints of {rows[0]['bits']:g} bits, {rows[0]['role']} {what}, router {name}: {gained} of "
        f"(oracle - best single); router against best single {change(gap, around, mean(single))}"
    )
    return line(f"{text}; wanted 50 % and no loss", gap <= around and (part or 0) >= 0.5)


def _claims_of_adjustments(rows: Sequence[Row], bits: float) -> list[str]:
    found = []
    base, own = pick(rows, kind="variant", name="base"), pick(rows, kind="always-right")
    for kind in (name for name in routers(rows) if "likelihood" not in name):  # those labels are a comparison
        router = pick(rows, kind="router", name=kind)
        size = router[0]["bytes_total"] / router[0]["base_bytes"]
        gain, beyond, part = 1 - mean(router) / mean(base), mean(router) / mean(own) - 1, share(rows, kind)
        where = f"adjustments of a base of {bits:g} bits, router {kind}"
        found.append(line(
            f"{where}: mean KL over six texts {gain:.1%} below the base's at {size:.3f} x its bytes, {beyond:+.1%} of "
            "always knowing the right one; wanted 35 %, 1.06, 10 %", gain >= 0.35 and size <= 1.06 and beyond <= 0.1,
        ))  # fmt: skip
        assert part is not None
        found.append(line(f"{where}: {part:.0%} of (oracle - best single); wanted 50 %", part >= 0.5))
    return found


def adjustments(rows: Sequence[Row]) -> list[Row]:
    return pick(rows, model="reference MoE, adjustments")


def checkpoints(rows: Sequence[Row]) -> list[Row]:
    return pick(rows, model="reference MoE, checkpoints")


def of_images(rows: Sequence[Row]) -> list[Row]:
    return pick(rows, model="ResNet")


def all_bits(rows: Sequence[Row]) -> list[float]:
    return sorted({row["bits"] for row in rows}, reverse=True)


def all_of(rows: Sequence[Row], bits: float) -> list[Row]:
    """Rows with all variants."""
    some = pick(rows, bits=bits, role="known")
    return pick(some, variants=max(row["variants"] for row in some)) + pick(some, variants=1)


def routers(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["name"] for row in pick(rows, kind="router")))


def left_out(rows: Sequence[Row]) -> str:
    """Texts that neither an adjustment nor the router has seen."""
    lines = []
    if not pick(rows, role="novel"):
        return ""
    for bits in all_bits(rows):
        some = pick(rows, bits=bits, role="novel")
        for text in dict.fromkeys(row["distribution"] for row in some):
            mine = pick(some, distribution=text)
            base, router = pick(mine, kind="variant", name="base"), pick(mine, kind="router")
            gap, around = against(router, base)
            shown = (base, *(pick(mine, kind=kind) for kind in ("best-single", "uniform-routing", "router", "oracle")))
            cells = [f"{mean(found):.5f}" for found in shown]
            lines.append([f"{bits:g} bits, {text}", *cells, change(gap, around, mean(base))])
    names = ["text", "base", "best single", "uniform routing", "router (linear)", "oracle", "router against base"]
    return "Left out: neither an adjustment nor the router has seen the text.\n\n" + table(names, lines)


def planes(rows: Sequence[Row]) -> str:
    """Widths of which one is the upper planes of the other, against each alone."""
    lines = []
    for wide in all_bits(rows):
        some = pick(rows, bits=wide)
        names = list(dict.fromkeys(row["name"] for row in some))
        values = [mean(pick(some, name=name)) for name in names]
        total, shared = some[0]["bytes_total"], some[0]["shared"]
        for name, value in zip(names, values, strict=True):
            alone = values[names.index(f"{name.split()[0]} bits alone")]
            lines.append([
                name, nats(value), "" if "alone" in name else f"{value / alone:.2f}",
                "" if "alone" in name else f"{shared:,} of {total:,} ({shared / total:.0%})",
            ])  # fmt: skip
    return table(["checkpoint", "mean KL", "x that of the width alone", "bytes saved of both"], lines)


def ceilings(rows: Sequence[Row]) -> str:
    """Where there is little to choose: how far below the best single variant the best choice and the ensemble are."""
    found = []
    for bits in all_bits(rows):
        for role in ("known", "novel"):
            some = pick(rows, bits=bits, variants=5, role=role)
            single = pick(some, kind="best-single")
            best, together = (mean(pick(some, kind=kind)) / mean(single) - 1 for kind in ("oracle", "ensemble"))
            names = " or ".join(dict.fromkeys(row["name"] for row in single))
            found.append([f"{bits:g} bits, {role}", names, f"{best:+.0%}", f"{together:+.0%}"])
    heads = [
        "five checkpoints",
        "best single",
        "best choice of each input",
        "mean of their logits, five times the work",
    ]
    return table(heads, found)


def images(rows: Sequence[Row]) -> str:
    """The section on images, and its picture."""
    sets = [(b, role, pick(rows, bits=b, variants=5, role=role)) for b in all_bits(rows) for role in ("known", "novel")]
    # those of the fewest bits: at more, chance is so much worse that no other bar could be seen
    groups = [(f"{b:g} bits, {role}", relative(some)) for b, role, some in sets if b == min(all_bits(rows))]
    PAGE.with_name("mixture-images.svg").write_text(bars(groups, "se-resnet"))
    tables = [f"{b:g} bits, {role} images:\n\n{ways(some)}\n{usage(some, 'se-resnet')}" for b, role, some in sets]
    return IMAGES.format(
        ceilings=ceilings(rows),
        known=counts(rows, "known", "se-resnet"), novel=counts(rows, "novel", "se-resnet"), tables="\n".join(tables),
        bytes=f"{pick(rows, kind='router')[0]['router_bytes']:,}",
    )  # fmt: skip


def write_page(summary: dict[str, Any]) -> None:
    """Write the page and its pictures."""
    rows = summary["rows"]
    some, whole = adjustments(rows), checkpoints(rows)
    tables = [
        f"Base of {b:g} bits:\n\n{ways(all_of(some, b))}\n{usage(all_of(some, b), routers(all_of(some, b))[0])}\n"
        f"{all_routers(all_of(some, b), summary['latency'])}"
        for b in all_bits(some)
    ]
    parts = [
        TEXT.format(
            before="" if all("left_out" in row for row in pick(rows, kind="router")) else BEFORE,
            claims="\n".join(claims(summary)),
            tables="\n".join(tables),
            novel=left_out(some),
            counts=counts(some, "known"),
        )
    ]
    known = pick(some, bits=min(all_bits(some)), role="known")
    groups = [
        (f"{n} variants", pick(known, variants=n))
        for n in sorted({row["variants"] for row in known if row["kind"] == "router"})
    ]
    PAGE.with_name("mixture-adjustments.svg").write_text(bars(groups, "linear"))
    if whole:
        bits = all_bits(whole)
        for role in ("known", "novel"):
            # one scale for all widths: relative to the best single variant
            groups = [(f"{b:g} bits", relative(pick(whole, bits=b, variants=5, role=role))) for b in bits]
            PAGE.with_name(f"mixture-{role}.svg").write_text(bars(groups, "linear"))
        tables = [
            f"{b:g} bits, 5 variants, {role} texts:\n\n{ways(pick(whole, bits=b, variants=5, role=role))}"
            for b in bits for role in ("known", "novel")
        ]  # fmt: skip
        parts.append(
            WHOLE.format(
                ceilings=ceilings(whole),
                known=counts(whole, "known"),
                novel=counts(whole, "novel"),
                tables="\n".join(tables),
            )
        )
    seen = of_images(rows)
    if seen:
        parts.append(images(seen))
    shared = pick(rows, model="reference MoE, nested planes")
    if shared:
        parts.append(PLANES.format(table=planes(shared)))
    missing = [name for name, there in (
        *((f"checkpoints of {b} bits as variants", pick(whole, bits=b)) for b in (8, 4, 3)),
        *((f"images at {b} bits", pick(seen, bits=b)) for b in (8, 4)),
        ("texts that are left out", pick(some, role="novel")),
        ("single checkpoints of a mixture's bytes", pick(some, kind="same-bytes")),
        ("a base of 3 bits", pick(some, bits=3)), ("shared planes", shared),
        ("all three routers", len(routers(some)) > 3),
    ) if not there]  # fmt: skip
    if missing:
        parts.append(f"The study also measures the following, which these rows lack: {'; '.join(missing)}.\n")
    parts.append(ENDING + paper(summary))
    PAGE.write_text("\n".join(parts))


def paper(summary: dict[str, Any]) -> str:
    """The paper's claims beside ours, on adjustments of the base of the picture."""
    some = adjustments(summary["rows"])
    bits = min(all_bits(some))
    rows, times = all_of(some, bits), summary["latency"]["256"]
    router, single = (pick(rows, kind="router", name=routers(rows)[0]), pick(rows, kind="best-single"))
    gap, around = against(router, single)
    gains = []
    for count in range(2, router[0]["variants"] + 1):
        mine = pick(some, bits=bits, role="known", variants=count)
        if not mine:
            continue
        best = mean(pick(mine, kind="best-single"))
        gains.append(f"{100 * (mean(pick(mine, kind='router', name='linear')) / best - 1):+.0f} %")
    before, after = (mean(found, "perplexity") for found in (single, router))
    original = pick(rows, kind="original")
    own = f"{mean(original, 'perplexity'):.2f}" if original else "not measured"
    return table(["claim", "the paper", "here"], [
        ["better than the best single variant", "LLaMA-3B, INT8, WikiText-2: perplexity 11.01 against 11.82",
         f"adjustments of {bits:g} bits, six texts: {verdict(gap, around)}: KL {change(gap, around, mean(single))}, "
         f"perplexity {after:.2f} against {before:.2f}"],
        *_better(checkpoints(summary["rows"]), "linear", "the same, and INT4"),
        *_better(of_images(summary["rows"]), "se-resnet", "ResNet-50, INT8, ImageNet: top-1 78.01 against 77.09"),
        ["gains grow from 2 to 5 variants", "yes",
         f"adjustments: KL of router linear against best single: {', '.join(gains)}; checkpoints and images: above"],
        ["a perplexity below the original's", "OpenWebText, 12.46 in FP16",
         f"{after:.2f}, the original {own}; not a goal: [why](../methods/mixture.md#better-than-fp16)"],
        ["extra latency below 8 %, mostly 3 %", "V100S",
         f"{times['encoder'] / times['answer']:.1%} of reading 256 tokens and writing 32"],
        ["memory of one variant and the router", "below 500 MB more",
         f"{router[0]['bytes_resident'] / router[0]['base_bytes']:.3f} x the base's bytes"],
    ]).replace("---:|", "---|")  # fmt: skip


def _better(rows: Sequence[Row], name: str, theirs: str) -> Iterator[list[str]]:
    """Rows of the paper's first claim, on known inputs, for five checkpoints of each width."""
    for bits in all_bits(rows):
        some = pick(rows, bits=bits, variants=5, role="known")
        router, single = pick(some, kind="router", name=name), pick(some, kind="best-single")
        gap, around = against(router, single)
        kinds = ", ".join(row["distribution"] for row in router)
        mine = f"KL {change(gap, around, mean(single))}"
        agree = f"top-1 as the original {mean(router, 'top1'):.4f} against {mean(single, 'top1'):.4f}"
        what = f"five checkpoints of {bits:g} bits, {kinds}: {verdict(gap, around)}: {mine}, {agree}"
        yield ["the same", theirs, what]


def verdict(gap: float, around: float) -> str:
    if not gap:
        return "not confirmed, the same choice"
    return "undecided" if abs(gap) <= around else "confirmed" if gap < 0 else "not confirmed"


def relative(rows: Sequence[Row]) -> list[Row]:
    """Losses relative to the mean of the best single variant."""
    single = mean(pick(rows, kind="best-single"))
    return [row | {key: row[key] / single for key in ("kl_divergence", "interval")} for row in rows]


if __name__ == "__main__":
    write_page(json.loads(SUMMARY.read_text()))
