"""The paper's ablation (GPTQ, + base quantization, + adjustment) at the bytes of uniform 3 bits, as table and picture.

Needs the profile of benchmarks/adjust_study.py. Writes runs/adjust/ablation.json and adjust-ablation.{md,svg} in
docs/results.
"""

import json
from pathlib import Path

from adjust_study import KNOWN, MODEL, NOVEL, ROOT, RUNS, texts

import moqa
from moqa.adjustment import Search
from moqa.data import cut_windows
from moqa.evaluation.measure import Reference
from moqa.models.view import open_model
from moqa.profiling import read_profile
from moqa.progress import quiet
from moqa.tasks.causal_lm import load_tokenizer

PAGE = ROOT / "docs" / "results" / "adjust-ablation.md"
WINDOWS = 32
# base plan, and what is put on it: mode, rule and bytes
ROWS = {
    "GPTQ, uniform": ("uniform", None),
    "+ MoQa's base (fuzzy c-means)": ("paper", None),
    "+ MoQa's adjustment (v2, 16 bits)": ("paper", ("fp16", "dynamics", "1%")),
    "+ our base (budgeted)": ("budget", None),
    "+ our adjustment, 1 %": ("budget", ("residual", "gain", "1%")),
    "+ our adjustment, 3 %": ("budget", ("residual", "gain", "3%")),
}
BAR, GAP, LEFT, SCALE = 16, 8, 250, 420


def picture(rows: dict[str, dict[str, float]]) -> str:
    """Bars of the mean KL on novel (dark) and known text."""
    height, largest = len(rows) * (2 * BAR + GAP) + 30, max(max(r.values()) for r in rows.values())
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + SCALE + 80}" height="{height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    for number, (name, values) in enumerate(rows.items()):
        top = 24 + number * (2 * BAR + GAP)
        parts.append(f'<text x="{LEFT - 8}" y="{top + BAR + 4}" text-anchor="end" fill="#222">{name}</text>')
        for index, (role, colour) in enumerate((("novel", "#1f4e79"), ("known", "#9dc3e6"))):
            length, y = SCALE * values[role] / largest, top + index * BAR
            parts.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR - 2}" fill="{colour}"/>')
            parts.append(f'<text x="{LEFT + length + 5:.1f}" y="{y + 11}" fill="#222">{values[role]:.4f}</text>')
    parts.append(f'<text x="{LEFT}" y="14" fill="#222">mean KL: novel (dark), known (light)</text></svg>\n')
    return "".join(parts)


def main() -> None:
    view, profile, tokenizer = open_model(MODEL), read_profile(RUNS / "profile"), load_tokenizer(MODEL)
    held_out = texts("test", (*KNOWN, *NOVEL))
    windows = [cut_windows(d, tokenizer, 256, WINDOWS) for d in held_out]
    whole = Reference.of(view.model, windows, quiet)
    cut = {w.name: w for w in windows}
    size = moqa.plan(profile, None, strategy="uniform", known=KNOWN, widths=[3]).account.checkpoint
    folders: dict[str, Path] = {}
    for strategy in ("uniform", "paper", "budget"):
        widths = {"widths": [3]} if strategy == "uniform" else {}
        budget = None if strategy == "uniform" else f"{size}B"
        plan = moqa.plan(profile, budget, strategy=strategy, known=KNOWN, **widths)
        folders[strategy] = RUNS / f"ablation-{strategy}"
        moqa.quantize(MODEL, plan, folders[strategy], profile=profile, view=view, cache="full", overwrite=True)

    def divergence(folder: Path, name: str, adjustment: Path | None) -> float:
        reference = Reference(whole.model, [cut[name]], whole.hidden)
        found = moqa.evaluate(
            folder, texts("test", (name,)), against=MODEL, windows=WINDOWS, reference=reference, adjustment=adjustment
        )
        return found.distributions[name].kl_divergence or 0.0

    searches = {
        (strategy, name): Search(folders[strategy], texts("calib", (name,)))
        for strategy in ("paper", "budget")
        for name in NOVEL
    }
    table: dict[str, dict[str, float]] = {}
    for title, (strategy, added) in ROWS.items():
        values: dict[str, list[float]] = {"novel": [], "known": []}
        for name in NOVEL:
            out = None
            if added is not None:
                out = RUNS / "ablation-adjustment"
                mode, rule, budget = added
                searches[strategy, name].make(out, budget, mode, rule, overwrite=True)
            values["novel"].append(divergence(folders[strategy], name, out))
            values["known"] += [divergence(folders[strategy], known, out) for known in KNOWN[:1]]
        table[title] = {role: sum(found) / len(found) for role, found in values.items()}
        print(f"{title:36} novel {table[title]['novel']:.4f}, known {table[title]['known']:.4f}", flush=True)
    (RUNS / "ablation.json").write_text(json.dumps(table, indent=1) + "\n")
    PAGE.with_suffix(".svg").write_text(picture(table))
    lines = "\n".join(f"| {title} | {v['novel']:.4f} | {v['known']:.4f} |" for title, v in table.items())
    PAGE.write_text(f"""# The paper's ablation

Command: `make adjust-study` (`benchmarks/adjust_ablation.py`). KL divergence from the original, mean over python, math,
german and french, each with its own adjustment (novel), and of wiki under each of these (known); bases fitted on wiki
and novels by gptq at the bytes of uniform 3 bits. MoQa's rows are its base and its v2 adjustment (the channels with the
largest change of significance in 16 bits, 1 % of the bytes); ours are the budgeted plan with its hedge and residuals.

![bars of the table below](adjust-ablation.svg)

| row | novel KL | known KL |
|---|---:|---:|
{lines}
""")


if __name__ == "__main__":
    main()
