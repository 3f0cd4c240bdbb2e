"""Mixtures on the reference model: adjustments of one base, and whole checkpoints of 8, 4 and 3 bits, as variants.

    python benchmarks/mixture_study.py           # all parts that are missing
    python benchmarks/mixture_study.py whole-3   # one of them

Writes runs/mixture/summary.json, docs/results/mixture.md (once there are rows of adjustments), and
docs/results/mixture-novel.md. What is finished in runs/mixture is used again, and so are the rows of whole checkpoints
in docs/results/mixture.json; to measure a part anew, remove its file in runs/mixture/rows, and its rows there.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moqa
from moqa.format.reader import open_checkpoint
from moqa.generation import Sampling, generate
from moqa.mixture.features import prompt_end, read
from moqa.mixture.load import open_mixture
from moqa.mixture.measure import compared, token_losses
from moqa.mixture.record import is_mixture
from moqa.mixture.router import ROUTERS_OF, Router
from moqa.mixture.variants import AdjustmentVariant, CheckpointVariant, Spec
from moqa.models.layerwise import LayerwiseModel
from moqa.profiling import Profile
from moqa.progress import quiet
from moqa.runtime.load import load_packed
from moqa.tasks.causal_lm import load_tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from demo import KNOWN, MODEL, NOVEL, ROOT, texts
from image_mixture import SPENT_ON_IMAGES, images
from mixture_cases import MEASURED, PROMPT, RUNS, Case, Study, json_kept, say, sizes_of
from mixture_novel import write_novel_page
from mixture_page import adjustments as rows_of_adjustments
from mixture_page import write_page
from nested_planes import nested
from timing import take_turns

SPENT = RUNS / "latency.json"
KEPT = ROOT / "docs" / "results" / "mixture.json"  # part -> rows: runs/ is not kept
ALL = (*KNOWN, *NOVEL)
ADJUSTED = (2.5, 3)  # bits per weight of the base
# whole checkpoints differ in the texts that they are fitted on, or are fitted on none
FITTED = ("wiki", "python", "german")
BITS = (3, 4, 8)
IMAGE_BITS = (8, 4)
# windows of each text for a router of adjustments, and for one of whole checkpoints
SAMPLES, WHOLE_SAMPLES = 64, 32
CONTROLLED = 2.5  # bits of the base beside whose mixture stand single checkpoints of as many bytes


def adjusted(bits: float) -> dict[str, Spec]:
    """A base fitted on wiki and novels, and an adjustment to each other text."""
    base: dict[str, Spec] = {"base": CheckpointVariant(known=KNOWN, budget=f"{bits:g}bpw")}
    return base | {name: AdjustmentVariant(adjustment=name, bytes="1.46%", samples=192) for name in NOVEL}


def whole(bits: int) -> dict[str, Spec]:
    """Checkpoints of equal bytes."""
    uniform: dict[str, Any] = {"strategy": "uniform", "widths": (bits,)}
    found: dict[str, Spec] = {"all": CheckpointVariant(known=FITTED, **uniform)}
    found |= {name: CheckpointVariant(known=(name,), **uniform) for name in FITTED}
    return found | {"rtn": CheckpointVariant(known=FITTED, method="rtn", **uniform)}


class Summary:
    """Rows of all parts, those that are there and those that are measured now."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.spent: dict[str, Any] = {}  # see `latency`
        for path in (SPENT, SPENT_ON_IMAGES):
            if path.is_file():
                self.spent |= json.loads(path.read_text())

    @cached_property
    def language(self) -> Study:
        """Cases on the reference model."""
        return Study(self.rows, MODEL, texts("test", ALL), count=24, prompt=PROMPT)

    def part(self, name: str, measure: partial[None], wanted: bool) -> None:
        """Rows of a part of the study: those that are there, else measured if they are wanted."""
        path, before = RUNS / "rows" / f"{name}.json", len(self.rows)
        kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
        if path.is_file():
            self.rows += json.loads(path.read_text())
        elif name in kept:
            self.rows += kept[name]
        elif wanted:
            say(name)
            measure(self)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(self.rows[before:]) + "\n")
            self.store(f"{name} is measured")
        if measure.func is checkpoints and name not in kept and self.rows[before:]:
            keep(name, self.rows[before:])

    def store(self, done: str) -> None:
        """Write all rows so far, and the page."""
        rows = [{key: value for key, value in row.items() if key != "roles"} for row in self.rows]
        for row in rows:
            times, kind = (
                self.spent.get("1 image" if row["perplexity"] is None else str(PROMPT)),
                row["name"].split(",")[0],
            )
            row["latency_overhead"] = times[kind] / times["answer"] if times and kind in times else 0.0
        summary = {"rows": rows, "latency": self.spent}
        (RUNS / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        write_novel_page(rows)
        if rows_of_adjustments(rows):
            write_page(summary)
        say(done)


def keep(part: str, rows: list[dict[str, Any]]) -> None:
    """Keep the rows of a part in the tree, one on a line."""
    kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    kept[part] = [{key: value for key, value in row.items() if key != "roles"} for row in rows]
    parts = [
        f'"{name}": [\n' + ",\n".join(json.dumps(row, sort_keys=True) for row in some) + "\n]"
        for name, some in sorted(kept.items())
    ]
    KEPT.write_text("{" + ",\n".join(parts) + "}\n")


def built(name: str, specs: dict[str, Spec], known: Sequence[str], samples: int) -> Path:
    """A mixture; one that is finished is used again."""
    out = RUNS / name
    if not is_mixture(out):
        say(f"{name}: {', '.join(specs)}")
        moqa.build_mixture(
            MODEL, texts("calib", tuple(known)), out, variants=specs, samples=samples, measured=MEASURED
        )  # fmt: skip
    return out


def control(summary: Summary, known: tuple[str, ...]) -> None:
    """Rows of a single checkpoint that has the bytes of a whole mixture."""
    mixture, study = RUNS / f"adjusted-{CONTROLLED:g}", summary.language
    out, size = RUNS / f"single-{len(known)}", sizes_of(mixture)["bytes_total"]
    if not (out / "moqa.json").is_file():
        profile = profile_of(study, known)
        moqa.quantize(MODEL, moqa.plan(profile, f"{size}B", known=known), out, profile=profile, view=study.view)
    packed = open_checkpoint(out)
    found = token_losses(load_packed(packed, kernels="reference"), study.test, study.reference, quiet)
    about = {
        "model": "reference MoE, adjustments", "bits": CONTROLLED, "bytes_total": packed.bytes,
        "bytes_resident": packed.bytes, "variants": 1, "roles": dict.fromkeys(ALL, "known"),
    }  # fmt: skip
    study.add(about, "same-bytes", f"one checkpoint fitted on {'wiki and novels' if known == KNOWN else 'all'}", found)


def profile_of(study: Study, known: tuple[str, ...]) -> Profile:
    """The profile of texts that variants of a mixture are made from."""
    fit = [study.view.task.split(text)[0] for text in texts("calib", known)]
    return moqa.profile(MODEL, fit, MEASURED / "profile", view=study.view)


def latency(folder: Path, routers: dict[str, Router]) -> dict[str, Any]:
    """Median microseconds of routes, of reading a prompt, and of that and writing 32 tokens, on native kernels."""
    mixture = open_mixture(folder)
    model, tokenizer = mixture.use(mixture.record.router.base), load_tokenizer(MODEL)
    text = texts("test", ("wiki",))[0].texts[0]

    @torch.inference_mode()
    def route(router: Router, ids: list[int]) -> Tensor:
        return router.after(read(model, prompt_end(ids), router.reads))

    def answer(ids: list[int], tokens: int) -> list:
        return list(generate(model, tokenizer, ids, Sampling(max_tokens=tokens, temperature=0)))

    found = {}
    for length in (64, 256):
        ids = tokenizer(text[: 8 * length]).input_ids[:length]
        calls = {kind: lambda _, r=router, ids=ids: route(r, ids) for kind, router in routers.items()}
        calls |= {"prompt": lambda _, ids=ids: answer(ids, 1), "answer": lambda _, ids=ids: answer(ids, 32)}
        found[str(length)] = take_turns(calls, rounds=15)
    return found


def adjusted_case(study: Study, bits: float) -> tuple[Case, dict[str, Any]]:
    """Adjustments of one base, measured, and what all their rows say."""
    specs = adjusted(bits)
    out = built(f"adjusted-{bits:g}", specs, ALL, SAMPLES)
    return study.case(out, list(specs), texts("calib", ALL), SAMPLES, MEASURED), {
        "model": "reference MoE, adjustments", "bits": bits, **sizes_of(out), "roles": dict.fromkeys(ALL, "known"),
        "base_bytes": open_mixture(out, verify=False).record.variants["base"].bytes,
    }  # fmt: skip


def adjustments(summary: Summary, bits: float) -> None:
    """All ways to answer with adjustments of one base, and all routers among them."""
    study = summary.language
    case, about = adjusted_case(study, bits)
    own = LayerwiseModel(study.view.model)
    originals = {
        cut.name: compared(cut, {"": (own, study.reference.hidden[cut.name])}, study.reference)[""]
        for cut in study.test
    }
    study.add(about | {"variants": 1}, "original", "in 16 bits", originals)
    everything = [(kind, "divergence") for kind in ROUTERS_OF["causal_lm"]] + [("linear", "likelihood")]
    routers = study.ways(case, about, len(case.names), everything)
    summary.spent |= json_kept(SPENT, lambda: latency(case.folder, routers))


def fewer_adjustments(summary: Summary, bits: float) -> None:
    """Two to four adjustments, and texts that are left out."""
    study = summary.language
    case, about = adjusted_case(study, bits)
    for count in range(2, len(case.names)):
        study.ways(case, about, count, [("linear", "divergence")])
    for name in NOVEL:
        study.ways(case, about | {"roles": {name: "novel"}}, 4, [("linear", "divergence")], without=name)


def checkpoints(summary: Summary, bits: int) -> None:
    """All rows of whole checkpoints of a width."""
    specs, study = whole(bits), summary.language
    out = built(f"whole-{bits}", specs, FITTED, WHOLE_SAMPLES)
    case = study.case(out, list(specs), texts("calib", FITTED), WHOLE_SAMPLES, MEASURED)
    about = {
        "model": "reference MoE, checkpoints", "bits": bits, **sizes_of(out),
        "roles": {name: "known" if name in FITTED else "novel" for name in ALL},
    }  # fmt: skip
    for count in range(2, len(case.names) + 1):
        kinds = ["linear"] if count < len(case.names) else ROUTERS_OF["causal_lm"]
        study.ways(case, about, count, [(kind, "divergence") for kind in kinds])


def planes(summary: Summary) -> None:
    """Rows of checkpoints that share planes."""
    about = {"model": "reference MoE, nested planes", "roles": dict.fromkeys(ALL, "known")}
    nested(summary.language, MODEL, profile_of(summary.language, FITTED), FITTED, RUNS / "nested", about)


PARTS: dict[str, partial[None]] = {
    f"adjusted-{CONTROLLED:g}": partial(adjustments, bits=CONTROLLED),
    f"fewer-{CONTROLLED:g}": partial(fewer_adjustments, bits=CONTROLLED),
    **{f"whole-{bits}": partial(checkpoints, bits=bits) for bits in BITS},
    "single-known": partial(control, known=KNOWN), "single-all": partial(control, known=ALL),
    **{f"{name}-{bits:g}": partial(make, bits=bits) for bits in ADJUSTED if bits != CONTROLLED
       for name, make in (("adjusted", adjustments), ("fewer", fewer_adjustments))},
    "nested": partial(planes), **{f"images-{bits}": partial(images, width=bits) for bits in IMAGE_BITS},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Mixtures on the reference model.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"to measure, of {', '.join(PARTS)}; all by default")
    wanted = parser.parse_args().parts or list(PARTS)
    if unknown := set(wanted) - PARTS.keys():
        parser.error(f"{min(unknown)} is no part: known are {', '.join(PARTS)}")
    torch.manual_seed(0)
    RUNS.mkdir(parents=True, exist_ok=True)
    summary = Summary()
    for name, measure in PARTS.items():
        summary.part(name, measure, name in wanted)
    summary.store("the page is written")


if __name__ == "__main__":
    main()
