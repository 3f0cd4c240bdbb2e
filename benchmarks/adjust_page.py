"""docs/results/adjust.md and its picture, from the rows of `adjust_study.py`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from demo import ROOT

PAGE = ROOT / "docs" / "results" / "adjust.md"
SUMMARY = ROOT / "runs" / "adjust" / "summary.json"
Row = dict[str, Any]


def cases(rows: list[Row]) -> list[tuple[float, float, str]]:
    return list(dict.fromkeys((row["bits"], row["hedge"], row["novel"]) for row in rows))


def of_case(rows: list[Row], case: tuple[float, float, str]) -> list[Row]:
    return [row for row in rows if (row["bits"], row["hedge"], row["novel"]) == case]


def one(rows: Iterable[Row], kind: str, **wanted: Any) -> Row | None:
    return next((r for r in rows if r["kind"] == kind and all(r.get(k) == v for k, v in wanted.items())), None)


def change(row: Row | None, base: Row, key: str = "kl_novel") -> float:
    return float("nan") if row is None else row[key] / base[key] - 1


def percent(value: float) -> str:
    return f"{100 * value:+.1f}"


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * 2 + "---:|" * (len(headings) - 2)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def main_table(rows: list[Row]) -> str:
    lines = []
    for case in cases(rows):
        mine = of_case(rows, case)
        base, fitted = one(mine, "base"), one(mine, "requantized-for-it")
        assert base is not None
        assert fitted is not None
        added = [one(mine, "adjusted", wanted=wanted) for wanted in ("1%", "3%")]
        random, swap = one(mine, "random-channels"), one(mine, "swap")
        paper = [one(mine, "paper-rule", mode=mode) for mode in ("fp16", "requant")]
        gap = [
            "-" if r is None or base["kl_novel"] <= fitted["kl_novel"]
            else f"{(base['kl_novel'] - r['kl_novel']) / (base['kl_novel'] - fitted['kl_novel']):.0%}"
            for r in added
        ]  # fmt: skip
        lines.append([
            f"{case[0]:g}, {case[1]:g}", case[2], f"{base['kl_novel']:.4f}",
            *(percent(change(r, base)) for r in (*added, random, *paper, swap)), f"{fitted['kl_novel']:.4f}", *gap,
        ])  # fmt: skip
    headings = [
        "bits, hedge", "novel", "base KL", "1 %", "3 %", "random 1 %", "paper, fp16", "paper, requant", "swap",
        "quantized for it", "gap closed 1 %", "3 %",
    ]  # fmt: skip
    return table(headings, lines)


def known_table(rows: list[Row]) -> str:
    lines = []
    for case in cases(rows):
        mine = of_case(rows, case)
        base = one(mine, "base")
        assert base is not None
        found = [one(mine, "adjusted", wanted="1%"), one(mine, "adjusted", wanted="3%"), one(mine, "swap")]
        lines.append([
            f"{case[0]:g}, {case[1]:g}", case[2], f"{base['kl_known']:.4f}",
            *(percent(change(r, base, "kl_known")) for r in found), f"{base['perplexity_novel']:.2f}",
            *("-" if r is None else f"{r['perplexity_novel']:.2f}" for r in found),
            f"{base['perplexity_known']:.2f}", *("-" if r is None else f"{r['perplexity_known']:.2f}" for r in found),
        ])  # fmt: skip
    headings = [
        "bits, hedge", "novel", "known KL", "1 %", "3 %", "swap", "novel ppl", "1 %", "3 %", "swap", "known ppl", "1 %",
        "3 %", "swap",
    ]  # fmt: skip
    return table(headings, lines)


def curve_table(rows: list[Row]) -> str:
    found = [c for c in cases(rows) if sum(r["kind"] == "adjusted" for r in of_case(rows, c)) > 2]
    budgets = sorted({r["wanted"] for r in rows if r["kind"] == "adjusted"}, key=lambda text: float(text.rstrip("%")))
    lines = []
    for case in found:
        mine = of_case(rows, case)
        base = one(mine, "base")
        assert base is not None
        cells = [percent(change(one(mine, "adjusted", wanted=b), base)) for b in budgets]
        lines.append([f"{case[0]:g}, {case[1]:g}", case[2], *cells])
    return table(["bits, hedge", "novel", *budgets], lines)


def claims(rows: list[Row]) -> list[str]:
    """What was wanted, and in how many cases it holds."""
    checks: dict[str, list[bool]] = {}

    def note(text: str, holds: bool) -> None:
        checks.setdefault(text, []).append(holds)

    for case in cases(rows):
        mine = of_case(rows, case)
        base, random, swap = one(mine, "base"), one(mine, "random-channels"), one(mine, "swap")
        small, large = one(mine, "adjusted", wanted="1%"), one(mine, "adjusted", wanted="3%")
        assert base is not None
        assert random is not None
        assert swap is not None
        assert small is not None
        assert large is not None
        paper = [r for r in mine if r["kind"] == "paper-rule"]
        note("1 % of bytes: novel KL at least 35 % lower", change(small, base) <= -0.35)
        note("1 % of bytes: novel KL at least 70 % lower (goal beyond)", change(small, base) <= -0.70)
        note("3 % of bytes: novel KL at least 55 % lower", change(large, base) <= -0.55)
        wanted, kind = (0.4, "unhedged") if case[1] == 0 else (0.2, "hedged")
        note(f"swap: novel KL at least {wanted:.0%} lower on the {kind} base", change(swap, base) <= -wanted)
        note("random channels bring less than a fifth of ours", change(random, base) > change(small, base) / 5)
        note("novel perplexity lower at 1 %", small["perplexity_novel"] < base["perplexity_novel"])
        note("known KL never more than 1 % higher, at 1 and 3 %",
             max(change(r, base, "kl_known") for r in (small, large)) <= 0.01)  # fmt: skip
        note("known perplexity never more than 1 % higher, at 1 and 3 %",
             max(change(r, base, "perplexity_known") for r in (small, large)) <= 0.01)  # fmt: skip
        note("the paper's own rule brings less than ours", all(change(r, base) > change(small, base) for r in paper))
    return [
        f"- {'holds' if all(found) else 'MISS '} in {sum(found)} of {len(found)}: {text}"
        for text, found in checks.items()
    ]


def write_page(rows: list[Row]) -> None:
    lines = "\n".join(claims(rows))
    PAGE.write_text(f"""# Adjustments to novel distributions

Command: `make adjust-study` (`benchmarks/adjust_study.py`; rows in `runs/adjust/summary.json`). Reference model, fitted
on wiki and novels by gptq at the bytes of uniform 3 bits and half-way to 2 bits, with the default hedge and without.
Adjustments see 64 windows of 256 tokens of a novel text; everything is measured on 32 windows of its held-out split and
of the known ones'. Bytes are those of the adjustment's weight file against the checkpoint's; the whole original that
lies beside it (`--cache full`, 38 MiB) is not loaded.

{lines}

Change of KL divergence on the novel text, in percent. `paper, fp16` and `paper, requant` spend 1 % as MoQa v2 and v3
do, on the channels with the largest change of significance. `gap closed`: between the base and a checkpoint of the same
bytes that was quantized for the novel text.

{main_table(rows)}

What it costs the known texts: change of their KL in percent, and perplexities. `swap` takes bits from experts that the
novel text does not need; that is its price.

{known_table(rows)}

More and fewer bytes, change of novel KL in percent:

{curve_table(rows)}

Times: [adjust-speed.md](adjust-speed.md); `search_seconds` in the rows are of a study that shares one measurement
among the adjustments of a case.
""")


if __name__ == "__main__":
    write_page(json.loads(Path(SUMMARY).read_text())["rows"])
