"""EMR-Merging on the reference model: four variants, each trained on one text, in one folder beside the four models.

The model was trained on all of these texts, and a short training on one of them gains nothing. So each text is put into
a form that the model has not seen, and that is what a variant learns.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import moqa
from moqa.data import Distribution, cut_windows
from moqa.evaluation.measure import Reference, divergences, scores
from moqa.mixture.merge import merge
from moqa.mixture.merged import read_merged
from moqa.models.view import open_model
from moqa.progress import quiet
from moqa.tasks.causal_lm import load_tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from demo import MODEL, ROOT, texts
from related_rows import Rows, say

RUNS = ROOT / "runs" / "related"
# a variant for each, in a form of its own
FORMS: dict[str, Callable[[str], str]] = {
    "python": str.upper,
    "math": lambda text: "\n".join(" ".join(reversed(line.split(" "))) for line in text.split("\n")),
    "german": lambda text: re.sub("[aeiouäöü]", "", text, flags=re.IGNORECASE),
    "french": lambda text: re.sub(r"\w+", lambda word: word[0][::-1], text),
}
TUNED = tuple(FORMS)
STEPS, BATCH, RATE, CONTEXT, WINDOWS = 40, 4, 5e-4, 256, 8


def text_of(split: str, name: str) -> Distribution:
    """A text in its form."""
    found = texts(split, (name,))[0]
    return replace(found, texts=tuple(map(FORMS[name], found.texts)))


def tuned(text: str, seed: int) -> Path:
    """The reference model after a short training on one text, written as transformers writes it; made once."""
    from transformers import AutoModelForCausalLM

    out = RUNS / "tuned" / f"{text}-{STEPS}-{seed}"
    if (out / "config.json").is_file():
        return out
    say(f"train on {text}")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, experts_implementation="grouped_mm")
    windows = cut_windows(text_of("calib", text), load_tokenizer(MODEL), CONTEXT, STEPS * BATCH, seed).inputs
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    for step in range(STEPS):
        batch = windows[order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)]]
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 5) * (1 - step / STEPS)
        logits = model(batch).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    fresh = out.with_name(f".{out.name}")
    model.bfloat16().save_pretrained(fresh)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL / name, fresh / name)
    fresh.rename(out)
    return out


def measured(folder: Path, seed: int) -> dict[str, Any]:
    """On each variant's own held-out text: divergence from that variant, and perplexity of the three models."""
    found: dict[str, Any] = {}
    base, mixed = open_model(MODEL).model, moqa.load(folder)[0]
    tokenizer = load_tokenizer(MODEL)
    for text in TUNED:
        cut = [cut_windows(text_of("test", text), tokenizer, CONTEXT, WINDOWS)]
        own = open_model(tuned(text, seed)).model
        reference = Reference.of(own, list(cut), quiet)
        for name, model in (("merged", mixed.mixture.use(text)), ("base", base)):
            found[f"kl_{text}_{name}"] = float(divergences(model, reference, quiet)[text].mean())
            found[f"perplexity_{text}_{name}"] = scores(model, list(cut), None, quiet)[text].perplexity
        found[f"perplexity_{text}_own"] = scores(own, list(cut), None, quiet)[text].perplexity
    return found


def whole(names: tuple[str, ...], seed: int) -> dict[str, Any]:
    """Merge some variants and measure; what is known is each variant's own text, nothing is novel."""
    out = RUNS / "tuned" / f"merged-{seed}"
    merge(MODEL, {name: tuned(name, seed) for name in names}, out, overwrite=True)
    record = read_merged(out)
    found = measured(out, seed)
    weights = record.account.base / 2
    kl = {kind: sum(found[f"kl_{name}_{kind}"] for name in names) / len(names) for kind in ("merged", "base")}
    return found | {
        "kl_known": kl["merged"], "kl_novel": None, "kl_base": kl["base"], "accuracy": None,
        "bytes": record.account.total, "bytes_apart": record.account.apart,
        "bytes_base": record.account.base,
        "bits_per_weight": record.account.total * 8 / weights,
        "steps": STEPS, "batch": BATCH, "rate": RATE, "windows": WINDOWS,
        "variants": json.loads(record.model_dump_json())["variants"],
    }  # fmt: skip


def control(row: dict[str, Any]) -> dict[str, Any]:
    """The base in the place of all variants, from the row of the merged ones."""
    base = {key: value for key, value in row.items() if not key.endswith("_merged") and key != "content"}
    return base | {
        "setting": "the base for all", "control": True, "kl_known": row["kl_base"], "bytes": row["bytes_base"],
        "bits_per_weight": 16.0,
    }  # fmt: skip


def study(rows: Rows, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """The merged variants, beside the base in their place (a control without bytes)."""
    found = []
    for seed in seeds:
        about = {"system": "emr-merging", "model": "reference", "seed": seed}
        depends = [STEPS, BATCH, RATE, WINDOWS, TUNED]
        row = rows.row(about | {"setting": "four variants", "control": False}, depends, partial(whole, TUNED, seed))
        found += [row, control(row)]
    return found


if __name__ == "__main__":
    study(Rows(RUNS / "rows"), (0,))
