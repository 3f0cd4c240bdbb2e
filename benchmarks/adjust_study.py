"""Adjustments on the reference model: python, math, german and french each in turn novel to four checkpoints.

Writes runs/adjust/summary.json and docs/results/adjust.md. The checkpoints are fitted on wiki and novels; adjustments
see 64 windows of a novel text's calibration split, and everything is measured on the test splits.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

import moqa
from moqa.adjustment import Search
from moqa.data import cut_windows
from moqa.evaluation.measure import Reference
from moqa.models.view import open_model
from moqa.progress import quiet
from moqa.tasks.causal_lm import load_tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from adjust_page import write_page
from demo import KNOWN, MODEL, NOVEL, ROOT, texts

RUNS = ROOT / "runs" / "adjust"
WINDOWS = 32
CURVE = ("0.25%", "0.5%", "2%", "5%")


class Study:
    """Checkpoints, their adjustments, and one reference that all are measured against."""

    def __init__(self, novel: tuple[str, ...]) -> None:
        self.novel, self.view = novel, open_model(MODEL)
        self.profile = moqa.profile(
            MODEL, texts("calib", (*KNOWN, *novel)), RUNS / "profile", report=quiet, view=self.view
        )
        tokenizer = load_tokenizer(MODEL)
        self.held_out = {d.name: d for d in texts("test", (*KNOWN, *novel))}
        cut = {name: cut_windows(d, tokenizer, 256, WINDOWS) for name, d in self.held_out.items()}
        whole = Reference.of(self.view.model, list(cut.values()), quiet)
        self.references = {
            name: Reference(whole.model, [cut[n] for n in (*KNOWN, name)], whole.hidden) for name in novel
        }
        uniform = {w: moqa.plan(self.profile, None, strategy="uniform", widths=[w]).account.checkpoint for w in (2, 3)}
        self.sizes = {2.5: (uniform[2] + uniform[3]) // 2, 3.0: uniform[3]}
        self.rows: list[dict[str, Any]] = []
        self.done: set[tuple] = set()

    def checkpoint(self, bits: float, hedge: float | None, known: tuple[str, ...]) -> tuple[Path, float]:
        """A checkpoint of these bytes fitted on these texts, and the hedge that its plan has."""
        plan = moqa.plan(self.profile, f"{self.sizes[bits]}B", known=known, hedge=hedge)
        out = RUNS / f"{'-'.join(known)}-{bits:g}-{'default' if hedge is None else f'{hedge:g}'}"
        if not (out / "moqa.json").is_file():
            shutil.rmtree(out, ignore_errors=True)
            moqa.quantize(MODEL, plan, out, profile=self.profile, view=self.view, cache="full")
        return out, float(plan.options.hedge or 0.0)

    def add(self, case: dict[str, Any], kind: str, folder: Path, adjustment: Path | None = None, **more: Any) -> dict:
        """Measure and keep a row."""
        novel = case["novel"]
        held_out = [self.held_out[name] for name in (*KNOWN, novel)]
        found = moqa.evaluate(
            folder, held_out, against=MODEL, windows=WINDOWS, reference=self.references[novel], adjustment=adjustment
        )
        known = [found.distributions[name] for name in KNOWN]
        row = case | {
            "kind": kind, "extra_bytes_percent": 100 * found.adjustment_bytes / found.bytes,
            "kl_novel": found.distributions[novel].kl_divergence,
            "kl_known": sum(q.kl_divergence or 0.0 for q in known) / len(known),
            "perplexity_novel": found.distributions[novel].perplexity,
            "perplexity_known": sum(q.perplexity for q in known) / len(known),
            "search_seconds": None, "apply_milliseconds": None,
        } | more  # fmt: skip
        self.rows.append(row)
        print(
            f"{novel:7} {case['bits']:g} bits, hedge {case['hedge']:g}: {kind:18} {row['extra_bytes_percent']:+5.2f} % "
            f"bytes, KL {row['kl_novel']:.5f} novel, {row['kl_known']:.5f} known",
            flush=True,
        )
        return row

    def adjusted(self, case: dict[str, Any], kind: str, folder: Path, search: Search, **options: Any) -> None:
        """Make an adjustment, time putting it on a loaded model, and measure it."""
        out = RUNS / "adjustment"
        made = search.make(out, overwrite=True, **options)
        model, _ = moqa.load(folder, verify=False)
        started = time.perf_counter()
        model.apply(out)
        applied = time.perf_counter() - started
        self.add(
            case, kind, folder, out, search_seconds=made.search_seconds, apply_milliseconds=1000 * applied,
            mode=made.mode, rule=made.rule, wanted=str(options.get("budget", "1%")), rows_and_columns=made.channels,
            units=made.units,
        )  # fmt: skip

    def case(self, bits: float, hedge: float | None, novel: str, curve: bool) -> None:
        """All rows of one checkpoint and one novel distribution."""
        folder, share = self.checkpoint(bits, hedge, KNOWN)
        case = {"novel": novel, "bits": bits, "hedge": share}
        self.add(case, "base", folder)
        search = Search(folder, texts("calib", (novel,)))
        for budget in ("1%", "3%", *(CURVE if curve else ())):
            self.adjusted(case, "adjusted", folder, search, budget=budget)
        self.adjusted(case, "random-channels", folder, search, rule="random")
        self.adjusted(case, "paper-rule", folder, search, mode="fp16", rule="dynamics")
        self.adjusted(case, "paper-rule", folder, search, mode="requant", rule="dynamics")
        self.adjusted(case, "swap", folder, search, mode="swap")
        fitted, _ = self.checkpoint(bits, hedge, (novel,))
        self.add(case, "requantized-for-it", fitted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--novel", nargs="+", default=NOVEL, choices=NOVEL)
    novel = tuple(parser.parse_args().novel)
    torch.manual_seed(0)
    RUNS.mkdir(parents=True, exist_ok=True)
    study = Study(novel)
    for bits in (3.0, 2.5):
        for hedge in (None, 0.0):
            for name in novel:
                study.case(bits, hedge, name, curve=bits == 3.0 and hedge is None)
                (RUNS / "summary.json").write_text(json.dumps({"rows": study.rows}, indent=1) + "\n")
    write_page(study.rows)


if __name__ == "__main__":
    main()
