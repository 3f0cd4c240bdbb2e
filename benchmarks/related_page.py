"""A page in docs/results for each related method, from the rows of `related_study.py`; run it to write them."""

from collections.abc import Callable, Sequence
from math import log

from related_placement_page import placement
from related_tables import COMMAND, RESULTS, Row, below, in_seeds, kl, of, one, read_rows, seeds, table, verdict

MERGED = (
    "variant", "change", "rescaler", "signs kept", "base ppl", "merged ppl", "own ppl", "kept", "base KL", "merged KL",
)  # fmt: skip


def calibration(rows: Sequence[Row]) -> str:
    """MoEQuant."""
    mine = of(rows, "moequant")
    names = list(dict.fromkeys(row["setting"] for row in mine))
    at = {name: row for name in names if (row := one(mine, name))}
    spread = {name.removeprefix("spread of "): row for name, row in at.items() if name.startswith("spread of ")}
    plain, even = spread["plain text"], spread["balanced own text"]
    ratio = plain["balance"] / even["balance"]
    verdicts = [verdict(ratio >= 5, (
        f"balanced text uses experts more evenly than plain text: spread {ratio:.2f} times lower; wanted 5 "
        "(arXiv 2505.03804: 8.2 times lower than wikitext2)"
    ))]  # fmt: skip
    measured = {name: row for name, row in at.items() if row["kl_known"] is not None}
    for ours, theirs, what in (
        ("balanced own text", "plain text", "calibration on balanced text beats that on plain text"),
        ("balanced own text", "drawn own text", "calibration on balanced text beats that on text that is drawn"),
        ("plain text, gates on", "plain text, gates off", "gate-weighted Gram matrices beat plain ones"),
    ):
        for role in ("known", "novel") if ours in measured and theirs in measured else ():
            one_, other = measured[ours], measured[theirs]
            verdicts.append(verdict(one_[f"kl_{role}"] < other[f"kl_{role}"], (
                f"{what} in {role} KL{in_seeds(one_, other, f'kl_{role}')}: {kl(one_, role)}, "
                f"{other[f'kl_{role}']:.4f} (arXiv 2505.03804)"
            )))  # fmt: skip
    lines = [[name, str(row["samples"]), f"{row['balance']:.4f}"] for name, row in spread.items()]
    parts = [table(["text", "windows", "spread"], lines)]
    if measured:
        lines = [[name, kl(row, "known"), kl(row, "novel")] for name, row in measured.items()]
        parts.append(table(["calibrated on", "known KL", "novel KL"], lines))
    else:
        parts.append("Not measured yet: what it does to quantized models, and gates on and off.")
    return f"""# Calibration that is fair to experts

{COMMAND.format("calibration")}
The reference model, {seeds(mine)}. Spread: standard deviation of the shares of a block's experts on a text, mean over
blocks. Quantized are uniform 3 bits (integers, groups of 64), gptq without gradients at outputs; known and novel texts
as on [this page](quantmoe-bench.md).

MoEQuant (arXiv 2505.03804) calibrates on text that the model writes itself by a beam search for likely text which
uses its experts evenly (beam of 4, tau 1.2), and weights each token of an expert by its gate in GPTQ's Gram matrix.
On DeepSeek-MoE the spread falls from 0.0427 on wikitext2 to 0.0052, and the mean accuracy rises from 39.01 to 39.87.
Ours are how candidates are found (the four likeliest next tokens of each, all of them read) and the mean of the
imbalance over blocks; [`moqa profile --own-text balanced`](../commands/profile.md), `--method gptq-affinity`,
`gptq-plain`.

{chr(10).join(verdicts)}

{(chr(10) * 2).join(parts)}

`gates on` is the paper's weighting, `gates off` none; gptq itself weights by the square of the gate, which is the error
of the block's output.
"""


def components(rows: Sequence[Row]) -> str:
    """MoQE (2023)."""
    mine = of(rows, "moqe-2023")
    names = sorted({row["setting"] for row in mine}, key=lambda name: (name.split()[0] != "experts", name))
    at = {name: row for name in names if (row := one(mine, name))}
    lines = [
        [name, f"{row['weights'] / 1e6:.2f} M", f"{row['bytes']:,}", kl(row, "known"), kl(row, "novel")]
        for name, row in at.items()
    ]
    verdicts = []
    for width in (3, 2):
        experts, attention, table_ = (at[f"{part} at {width} bits"] for part in ("experts", "attention", "embedding"))
        for other, name in ((attention, "attention"), (table_, "the embedding and head")):
            verdicts.append(verdict(
                experts["kl_known"] < other["kl_known"],
                f"{width} bits: experts alone cost less than {name} alone: known KL {experts['kl_known']:.4f}, {name} "
                f"{other['kl_known']:.4f}, at {experts['weights'] / other['weights']:.1f} times the weights "
                "(arXiv 2310.02410)",
            ))  # fmt: skip
    trained = next((row for name, row in at.items() if "trained" in name), None)
    if trained is not None:
        plain = at["experts at 2 bits"]
        verdicts.append(verdict(trained["kl_known"] < plain["kl_known"], (
            f"a short training rescues experts at 2 bits: known KL {trained['kl_known']:.4f}, "
            f"{below(trained['kl_known'], plain['kl_known'])} (arXiv 2310.02410: 45.90 BLEU beside 46.35)"
        )))  # fmt: skip
        verdicts.append(verdict(trained["kl_novel"] < plain["kl_novel"], (
            f"on novel text, too: novel KL {trained['kl_novel']:.4f}, {below(trained['kl_novel'], plain['kl_novel'])}"
        )))  # fmt: skip
    return f"""# Which part of the model takes few bits

{COMMAND.format("components")}
The reference model, {seeds(mine)}; one
part is rounded to nearest (integers, groups of 64), all else stays in 16 bits; {mine[0]["windows"]} held-out windows
of 256 tokens per text, known and novel ones as on [this page](quantmoe-bench.md).

MoQE (arXiv 2310.02410) rounds the experts of a translation model and nothing else, by channel and symmetric: 46.35
BLEU in 16 bits, 46.18 at 4, 46.01 at 3, and 45.90 at 2 after training with rounding in the loop, which it needs
there. Ours: divergence in place of BLEU, groups of 64 in place of channels, and [`moqa
recover`](../commands/recover.md), which trains scales, zero-points, norms and routers of the finished checkpoint, no
integers. The model has no dense feed-forward layers.

{chr(10).join(verdicts)}

{table(["rounded", "weights", "bytes of the model", "known KL", "novel KL"], lines)}
"""


def experts(rows: Sequence[Row]) -> str:
    """UNCURL."""
    mine = of(rows, "uncurl")
    names = sorted({row["setting"] for row in mine}, key=lambda name: ("bits" in name, name))
    at = {name: row for name in names if (row := one(mine, name))}
    lines = [
        [name, f"{row['bits_per_weight']:.2f}", f"{row['bytes']:,}", kl(row, "known"), kl(row, "novel")]
        for name, row in at.items()
    ]
    verdicts = []
    for count in (12, 8):
        ours = at.get(f"{count} experts by uncurl")
        for by in ("frequency", "random"):
            other = at.get(f"{count} experts by {by}")
            if ours and other:
                verdicts.append(verdict(ours["kl_known"] < other["kl_known"], (
                    f"16 to {count} experts: merging loses less on the task than {by}"
                    f"{in_seeds(ours, other, 'kl_known')}: KL {ours['kl_known']:.4f} ± "
                    f"{ours['kl_known_interval']:.4f}, {by} {other['kl_known']:.4f} (arXiv 2409.01483)"
                )))  # fmt: skip
        fewer, small = (
            at.get(f"16 experts, the bytes of {count} at 4.3 bits"),
            at.get(f"{count} experts by uncurl, 4.3 bits"),
        )
        if fewer and small:
            for role, text in (("known", "on the task"), ("novel", "on other texts")):
                verdicts.append(verdict(fewer[f"kl_{role}"] < small[f"kl_{role}"], (
                    f"the bytes of {count} experts at 4.3 bits are better spent on all 16 at fewer bits {text}"
                    f"{in_seeds(fewer, small, f'kl_{role}')}: KL {fewer[f'kl_{role}']:.4f}, {count} experts "
                    f"{small[f'kl_{role}']:.4f}"
                )))  # fmt: skip
    return f"""# Fewer experts, or fewer bits

{COMMAND.format("experts")}
The reference model, {seeds(mine)}; the task is wiki (known): 64 windows of its
calibration text decide what becomes one expert, 8 windows of its test text are measured, and 8 of each of the five
other texts (novel). KL is from the original with all of its 16 experts. Rows with bits are quantized by the default
plan for the task.

UNCURL (arXiv 2409.01483) merges experts by their router logits, then trains a little on the task; it finds that
pruning by frequency hurts, and that half of the experts, sometimes a quarter, can do as well as a model that was
trained that small. Here nothing is trained afterwards ([method](../methods/reduce.md), [`moqa
reduce`](../commands/reduce.md)).

{chr(10).join(verdicts)}

{table(["", "bits/weight", "bytes", "task KL", "KL on other texts"], lines)}
"""


def merging(rows: Sequence[Row]) -> str:
    """EMR-Merging."""
    mine = of(rows, "emr-merging")
    row = one(mine, "four variants")
    assert row is not None
    names = list(row["variants"])
    lines, shares = [], []
    for name in names:
        own, merged, base = (row[f"perplexity_{name}_{kind}"] for kind in ("own", "merged", "base"))
        shares.append(log(base / merged) / log(base / own))
        lines.append([
            name, f"{row['variants'][name]['distance']:.4f}", f"{row['variants'][name]['rescaler']:.3f}",
            f"{row['variants'][name]['agreement']:.3f}", f"{base:.2f}", f"{merged:.2f}", f"{own:.2f}",
            f"{shares[-1]:.1%}", f"{row[f'kl_{name}_base']:.4f}", f"{row[f'kl_{name}_merged']:.4f}",
        ])  # fmt: skip
    apart = row["bytes"] / row["bytes_apart"]
    verdicts = [
        verdict(apart < 0.6, f"four variants take {apart:.1%} of the bytes of four checkpoints: {row['bytes']:,} of "
                f"{row['bytes_apart']:,}; wanted 60 %"),
        verdict(row["kl_known"] < row["kl_base"], f"a merged variant is nearer to its own model than the base is: KL "
                f"{row['kl_known']:.4f}, {below(row['kl_known'], row['kl_base'])} the base's (arXiv 2405.17461)"),
        verdict(sum(shares) / len(shares) >= 0.9, (
            f"merged variants keep of what training gained in log perplexity, mean of four: "
            f"{sum(shares) / len(shares):.1%}, at least {min(shares):.1%}; wanted 90 % "
            "(arXiv 2405.17461: 88.74 % beside about 90.5 % accuracy)"
        )),
    ]  # fmt: skip
    return f"""# Four fine-tuned variants in one folder

{COMMAND.format("merge")}
The reference model trained on each of four texts for {row["steps"]} steps of {row["batch"]} windows of 256 tokens
(AdamW, rate {row["rate"]:g} falling to 0), {seeds(mine)}; measured on {row["windows"]} held-out windows of the
variant's own text. KL is from the variant itself. The model was trained on all of these texts, and a short training on
one of them gains less than 1 %. So each has a form that the model has not seen: python in capitals, math with the words
of a line in reverse order, german without vowels, french with the letters of each word in reverse order.

EMR-Merging (arXiv 2405.17461) stores one vector for all variants, a bit per weight and variant and a number per
variant, without data or training; on eight image tasks ViT-B/32 reaches 88.74 % on average. What is ours:
[method](../methods/merge.md).

{chr(10).join(verdicts)}

{table(MERGED, lines)}

Bytes: {row["bytes"]:,} = base and vector of 16 bits per weight each, and four masks of one bit,
{row["bits_per_weight"]:.2f} bits per weight; four checkpoints have {row["bytes_apart"]:,}.
"""


PAGES: dict[str, Callable[[Sequence[Row]], str]] = {
    "quantmoe-bench": placement, "moequant": calibration, "moqe-2023": components, "uncurl": experts,
    "emr-merging": merging,
}  # fmt: skip


def write_pages(rows: Sequence[Row]) -> None:
    """Write the page of every system that has rows."""
    for system, page in PAGES.items():
        if of(rows, system):
            (RESULTS / f"{system}.md").write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    write_pages(read_rows())
