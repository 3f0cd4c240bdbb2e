"""The page of QuantMoE-Bench's question: all strategies at equal bytes, per model, budget and seed."""

from collections.abc import Sequence

from related_tables import COMMAND, Row, in_seeds, kl, of, one, seeds, table, verdict

BUDGETS = (2.1, 2.5, 3.0, 3.5)
DEFAULT, MIXED = "auto", "budget, all encodings"
DENSE = "SmolLM2-135M"
DENSE_TEXT = f"""
{DENSE} is a dense model, made as [this page](low-bits.md) says (`benchmarks/related_dense.py`): the strategies that
need no experts, 16 calibration windows per known text and 4 held-out windows per text, one seed.
"""
NO_DENSE = f"""
Not measured yet: {DENSE} (`python benchmarks/related_dense.py`).
"""


def complete(rows: Sequence[Row], budget: float) -> list[Row]:
    """Rows of a budget, of the seeds that are measured whole: the row with all encodings is each seed's last."""
    at = [row for row in rows if row["budget"] == budget]
    done = {row["seed"] for row in at if row["strategy"] == MIXED}
    return [row for row in at if row["seed"] in done]


def least_in(at: dict[str, Row], role: str) -> str:
    """In how many seeds no placement has less than the default; nothing for a single seed."""
    each = {row["seed"]: row[f"kl_{role}"] for row in at[DEFAULT]["each"]}
    others = [row for name, found in at.items() if name != MIXED for row in found["each"]]
    won = [all(row[f"kl_{role}"] >= least for row in others if row["seed"] == seed) for seed, least in each.items()]
    return f" in {sum(won)} of {len(won)} seeds" if len(won) > 1 else ""


def default_verdicts(at: dict[str, Row], where: str) -> list[str]:
    """Whether the default places best, on known and on novel text."""
    alike = {name: row for name, row in at.items() if name != MIXED}
    lines = []
    for role in ("known", "novel"):
        best = min(alike, key=lambda name: (alike[name][f"kl_{role}"], name != DEFAULT))
        found, least = at[DEFAULT][f"kl_{role}"], alike[best][f"kl_{role}"]
        lines.append(verdict(found <= least, (
            f"{where}: the default's {role} KL is the least of all placements{least_in(at, role)}: {found:.4f}"
            + ("" if best == DEFAULT else f"; {best} has {least:.4f}")
        )))  # fmt: skip
    return lines


def frequency_verdicts(at: dict[str, Row], where: str) -> list[str]:
    """What the paper says of more bits for the most frequent experts."""
    if "frequent-first" not in at:
        return []
    ours, chance, plain = at["frequent-first"], at["random"], at["uniform"]
    return [
        verdict(ours["kl_known"] < chance["kl_known"], (
            f"{where}: more bits for the most frequent experts beat chance on known text"
            f"{in_seeds(ours, chance, 'kl_known')}: {ours['kl_known']:.4f}, chance {chance['kl_known']:.4f} "
            "(arXiv 2406.08155: 54.2 % accuracy beside 49.1 % at 2.54 bits)"
        )),
        verdict(ours["kl_novel"] < plain["kl_novel"], (
            f"{where}: they beat a uniform plan, which has no more bytes, on novel text, too"
            f"{in_seeds(ours, plain, 'kl_novel')}: {ours['kl_novel']:.4f}, uniform {plain['kl_novel']:.4f} "
            "(arXiv 2406.08155)"
        )),
    ]  # fmt: skip


def both(row: Row) -> float:
    return row["kl_known"] + row["kl_novel"]


def compared(rows: Sequence[Row], budget: float, where: str) -> tuple[list[str], str]:
    """Verdicts and the table of a budget; nothing if no seed is measured whole."""
    rows = complete(rows, budget)
    names = list(dict.fromkeys(row["strategy"] for row in rows))
    at = {name: row for name in names if (row := one(rows, f"{name} at {budget:g}"))}
    if not at:
        return [], ""
    best = min((row for name, row in at.items() if name != MIXED), key=both)
    lines = [
        [f"**{name}**" if row is best else name, f"{row['bits_per_weight']:.3f}", kl(row, "known"), kl(row, "novel")]
        for name, row in sorted(at.items(), key=lambda pair: both(pair[1]))
    ]
    shown = table(["strategy", "bits/weight", "known KL", "novel KL"], lines)
    return [*default_verdicts(at, where), *frequency_verdicts(at, where)], f"## {where}, {seeds(rows)}\n{shown}"


def placement(rows: Sequence[Row]) -> str:
    """QuantMoE-Bench."""
    mine = of(rows, "quantmoe-bench")
    verdicts, parts = [], []
    for model in dict.fromkeys(("reference", *(row["model"] for row in mine))):
        for budget in BUDGETS:
            where = f"{budget:g} bits" if model == "reference" else f"{model}, {budget:g} bits"
            lines, shown = compared([row for row in mine if row["model"] == model], budget, where)
            verdicts += lines
            parts += [shown] if shown else []
    dense = [row for row in mine if row["model"] == DENSE]
    return f"""# Where the bits of a budget should go

{COMMAND.format("placement")}
The reference model; fitted on wiki and novels, gptq, 8 held-out windows of 256 tokens per text: these (known), and
python, math, german and french (novel). All strategies place integers in groups of 64, so that nothing but the place
differs; `{MIXED}` is the default with what it may choose besides. `uniform` leaves the rest of a budget
unused: its bits are fewer. Calibration windows, the model's own text and chance differ between seeds. A number is the
mean over seeds ± half of the interval over windows (95 %), from the least to the largest of the seeds; the least sum
of known and novel KL is in bold. A strategy that a table lacks has no plan of so few bits.

QuantMoE-Bench (arXiv 2406.08155) asks this of rules for Mixtral and DeepSeek-MoE by accuracy, with 2 and 4 bits:
attention and shared experts first, frequent experts first, first blocks first, and two scores, of weights and of
blocks. What each rule is here, and what is ours in it: [methods](../methods/moqa.md#strategies-moqa-plan---strategy).
The same question for any profile: [`moqa compare-plans`](../commands/compare-plans.md).
{DENSE_TEXT if dense else NO_DENSE}
{chr(10).join(verdicts)}

{(chr(10) * 2).join(parts)}
"""
