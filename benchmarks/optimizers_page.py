"""Writes docs/results/optimizers.md from the rows of `optimizers_study.py`."""

from collections.abc import Callable, Sequence
from statistics import mean

from scipy.stats import spearmanr
from trained_rows import ROOT, Row, known

PAGE = ROOT / "docs" / "results" / "optimizers.md"
MEASURES = {"deviation": "R_L", "mmr": "MMR", "kurtosis": "kurtosis"}


def write_page() -> None:
    rows = known("optimizers")
    if not rows:
        return
    rounded = {setting: of(rows, f"{setting}, rounded") for setting in ("W4A4", "W3")}
    trained = of(rows, "W4A4, trained")
    first = rounded["W4A4"]
    names = sorted({row["optimizer"] for row in first}, key=lambda name: mean(map(cost, by(first, name))))
    lines = [
        f"| {name} | {by(first, name)[0]['rate']:g} | {each(by(first, name), 'steps', '.0f')} | "
        f"{each(by(first, name), 'loss_original', '.3f')} | {each(by(first, name), 'mmr', '.2f')} | "
        f"{each(by(first, name), 'kurtosis', '.2f')} | {each(by(first, name), 'deviation', '.3f')} | "
        f"{each(by(first, name), 'passed_on', '.0%')} | {cell(by(first, name))} | {cell(by(rounded['W3'], name))} | "
        f"{cell(by(trained, name))} |"
        for name in names
    ]
    ranks = {
        setting: {key: float(spearmanr([row[key] for row in some], [cost(row) for row in some]).statistic)
                  for key in MEASURES}
        for setting, some in rounded.items() if len(some) > 2
    }  # fmt: skip
    seeds = len({row["seed"] for row in rows})
    PAGE.write_text(
        _PAGE.format(
            models=len(first), seeds=f"{seeds} seed{'s' if seeds > 1 else ''}", lines="\n".join(lines),
            ranks="\n".join(
                f"| {MEASURES[key]} | " + " | ".join(f"{ranks[setting][key]:+.2f}" for setting in ranks) + " |"
                for key in MEASURES
            ),
            claims="\n".join(claims(ranks, first, trained, names)),
        )
    )  # fmt: skip


def claims(
    ranks: dict[str, dict[str, float]], first: Sequence[Row], trained: Sequence[Row], names: Sequence[str]
) -> list[str]:
    """The paper's claims, with what is found here; none before all optimizers are measured."""
    if "shampoo" not in names or len(ranks) < 2:
        return []
    found = ranks["W4A4"]
    others = max(found["mmr"], found["kurtosis"])
    after = sorted(names, key=lambda name: mean(map(cost, by(trained, name))))
    most = max(names, key=lambda name: mean(row["mmr"] for row in by(first, name)))
    gap = mean(map(cost, by(first, names[-1]))) / mean(map(cost, by(first, names[0])))
    return [
        verdict(gap >= 1.2, f"models of one loss lose differently by the optimizer, {names[-1]} beside {names[0]}: "
                f"{gap:.2f} times as much (arXiv 2509.23500)"),
        verdict(found["deviation"] > max(others, 0.5), "R_L ranks what rounding costs a model, better than MMR "
                f"({found['mmr']:+.2f}) and kurtosis ({found['kurtosis']:+.2f}): rank correlation "
                f"{found['deviation']:.2f} (arXiv 2509.23500)"),
        verdict(names[0] == "shampoo", f"Shampoo loses least when it is rounded (here {names[0]} does), Shampoo: "
                f"{mean(map(cost, by(first, 'shampoo'))):.4f} nats (arXiv 2509.23500)"),
        verdict(after[0] == "shampoo", "Shampoo loses least after training with the rounding "
                f"(here {after[0]} does), Shampoo: {mean(map(cost, by(trained, 'shampoo'))):.4f} nats "
                "(arXiv 2509.23500)"),
        verdict(most == "shampoo", f"Shampoo has the largest outliers (here {most} has), Shampoo: MMR "
                f"{mean(row['mmr'] for row in by(first, 'shampoo')):.2f} (arXiv 2509.23500)"),
    ]  # fmt: skip


def verdict(holds: bool, text: str) -> str:
    return f"- {'holds' if holds else 'MISS '}  {text}"


def of(rows: Sequence[Row], setting: str) -> list[Row]:
    return [row for row in rows if row["setting"] == setting]


def by(rows: Sequence[Row], optimizer: str) -> list[Row]:
    return [row for row in rows if row["optimizer"] == optimizer]


def cost(row: Row) -> float:
    """Divergence from the original in nats per byte: less noise than the difference of two losses."""
    return row["kl_known"]


def each(rows: Sequence[Row], key: str, how: str) -> str:
    return format(mean(row[key] for row in rows), how)


def cell(rows: Sequence[Row], value: Callable[[Row], float] = cost) -> str:
    return format(mean(map(value, rows)), ".4f") if rows else "-"


_PAGE = """# Optimizers and what rounding costs

Command: `python benchmarks/optimizers_study.py`
({models} models, {seeds}; rows in runs/trained/summary.json).

Claim of Beyond Outliers (arXiv 2509.23500): models that different optimizers took to the same loss lose differently
when they are rounded. Neither the ratio of the largest to the mean value (MMR) nor kurtosis foretells how much, but the
relative deviation that reaches the end of the network (R_L) does; Shampoo loses least, though its outliers are the
largest. There: 50 M to 1.5 B parameters, each optimizer tuned.

Here: a Llama of 3 blocks of 128 (0.5 M weights in them) that predicts bytes of wiki and novels, trained to the same
loss on held-out text. The optimizer in question has the matrices of the blocks, at a rate that was not tuned;
embedding, head and norms have AdamW in every row. Weights are symmetric integers of 4 bits with a scale for 128 of a
row, inputs of the layers have 4 bits (W4A4); or weights have 3 bits (W3). *Trained*: 40 more steps of the same
optimizer with the rounding in them, beside the model that was trained on as long without it. MMR and kurtosis are means
over rows of the inputs of all layers; R_L is the squared deviation after the last block relative to the original's
output; *passed on* is the share of a layer's error that its inputs brought. What rounding costs is the divergence from
the original in nats per byte of held-out text.

| optimizer | rate | steps | loss | MMR | kurtosis | R_L | passed on | KL, W4A4 | W3 | W4A4 trained |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
{lines}

Rank correlation (Spearman) over the {models} models with what rounding costs:

| measure | W4A4 | W3 |
|---|---:|---:|
{ranks}

{claims}

AdamW, Muon and SOAP are members of moqa's registry (`moqa recover --optimizer`); Shampoo is that of the same package as
SOAP, with RMSProp's lengths of steps. The models are small, and were trained for a minute each;
ranks of so few say little.
"""
