"""Mixtures on the reference model: adjustments of one base, and whole checkpoints of 8, 4 and 3 bits, as variants.

    python benchmarks/mixture_study.py           # all parts that are missing
    python benchmarks/mixture_study.py whole-3   # one of them

Writes runs/mixture/summary.json and docs/results/mixture.md. What is finished in runs/mixture is used again; to measure
a part anew, remove its file in runs/mixture/rows.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moqa
from moqa.data import Windows, cut_windows
from moqa.evaluation.measure import Reference, final_hidden
from moqa.format.reader import open_checkpoint
from moqa.generation import Sampling, generate
from moqa.mixture.features import prompt_end, read
from moqa.mixture.finish import held_out_windows
from moqa.mixture.load import Mixture, open_mixture
from moqa.mixture.losses import LossStore
from moqa.mixture.measure import TokenLosses, compared, token_losses
from moqa.mixture.record import is_mixture
from moqa.mixture.router import ROUTERS, Router, stored
from moqa.mixture.train import RouterSamples, TrainedRouter, chosen, train
from moqa.mixture.variants import AdjustmentVariant, CheckpointVariant, Spec
from moqa.models.layerwise import LayerwiseModel
from moqa.models.view import ModelView, open_model
from moqa.progress import quiet
from moqa.runtime.load import load_packed
from moqa.tasks.causal_lm import load_tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from demo import KNOWN, MODEL, NOVEL, ROOT, texts
from mixture_page import write_page
from timing import take_turns

RUNS = ROOT / "runs" / "mixture"
MEASURED = RUNS / "measured"
CONTEXT, PROMPT = 256, 64
ALL = (*KNOWN, *NOVEL)
ADJUSTED = (2.5, 3)  # bits per weight of the base
# whole checkpoints differ in the texts that they are fitted on, or are fitted on none
FITTED = ("wiki", "python", "german")
BITS = (3, 4, 8)
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


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def built(name: str, specs: dict[str, Spec], known: Sequence[str], router: str, labels: str, samples: int) -> Path:
    """A mixture; one that is finished is used again."""
    out = RUNS / name
    if not is_mixture(out):
        say(f"{name}: {', '.join(specs)}")
        moqa.build_mixture(
            MODEL, texts("calib", tuple(known)), out, variants=specs, router=router, labels=labels, samples=samples,
            measured=MEASURED,
        )  # fmt: skip
    return out


@dataclass
class Case:
    """A mixture, measured: the losses of its variants on the router's windows and on held-out ones.

    Attributes:
        folder: of the mixture.
        names: its choices.
        train: windows of the router.
        learn: losses of each variant on them.
        test: held-out windows.
        found: losses of each variant on them.
        ensembles: of the first variants: their number -> losses of the mean of their logits.
    """

    folder: Path
    names: list[str]
    train: list[Windows]
    learn: dict[str, dict[str, TokenLosses]]
    test: list[Windows]
    found: dict[str, dict[str, TokenLosses]]
    ensembles: dict[int, dict[str, TokenLosses]]


class Study:
    """All cases on one original."""

    def __init__(self, windows: int) -> None:
        self.view: ModelView = open_model(MODEL)
        self.tokenizer = load_tokenizer(MODEL)
        self.test = [cut_windows(text, self.tokenizer, CONTEXT, windows) for text in texts("test", ALL)]
        self.rows: list[dict[str, Any]] = []
        self.spent: dict[str, Any] = {}  # see `latency`

    @cached_property
    def reference(self) -> Reference:
        """The original's outputs on the held-out windows."""
        return Reference.of(self.view.model, list(self.test), quiet)

    def part(self, name: str, measure: Callable[["Study"], None], wanted: bool) -> None:
        """Rows of a part of the study: those that are there, else measured if they are wanted."""
        path, before = RUNS / "rows" / f"{name}.json", len(self.rows)
        if path.is_file():
            self.rows += json.loads(path.read_text())
        elif wanted:
            say(name)
            measure(self)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(self.rows[before:]) + "\n")
            self.store(f"{name} is measured")

    def case(self, folder: Path, names: list[str], known: Sequence[str], samples: int) -> Case:
        """Measure a mixture on the held-out windows, with variants that its own router does not choose."""
        mixture = open_mixture(folder, kernels="reference")
        parts = [self.view.task.split(text)[1] for text in texts("calib", tuple(known))]
        windows = [cut_windows(part, self.tokenizer, CONTEXT, samples) for part in parts]
        of = {n: v.of or n for n, v in mixture.record.variants.items()}
        of = dict(sorted(of.items(), key=lambda pair: pair[0] != pair[1]))
        learn = LossStore(MEASURED / "losses", windows).all(folder, of, self.view, quiet)
        return Case(folder, names, windows, learn, self.test, *self.measured(mixture, names))

    def store(self, done: str) -> None:
        """Write all rows so far, and the page."""
        rows = [{key: value for key, value in row.items() if key != "roles"} for row in self.rows]
        for row in rows:
            times, kind = self.spent.get(str(PROMPT)), row["name"].split(",")[0]
            row["latency_overhead"] = times[kind] / times["answer"] if times and kind in times else 0.0
        summary = {"rows": rows, "latency": self.spent}
        (RUNS / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        write_page(summary)
        say(done)

    def control(self, known: tuple[str, ...]) -> None:
        """Rows of a single checkpoint that has the bytes of a whole mixture."""
        mixture = RUNS / f"adjusted-{CONTROLLED:g}"
        out, size = RUNS / f"single-{len(known)}", sizes_of(mixture)["bytes_total"]
        if not (out / "moqa.json").is_file():
            fit = [self.view.task.split(text)[0] for text in texts("calib", known)]
            profile = moqa.profile(MODEL, fit, MEASURED / "profile", view=self.view)
            plan = moqa.plan(profile, f"{size}B", known=known)
            moqa.quantize(MODEL, plan, out, profile=profile, view=self.view)
        packed = open_checkpoint(out)
        found = token_losses(load_packed(packed, kernels="reference"), self.test, self.reference, quiet)
        about = {
            "model": "reference MoE, adjustments", "bits": CONTROLLED, "bytes_total": packed.bytes,
            "bytes_resident": packed.bytes, "variants": 1, "roles": dict.fromkeys(ALL, "known"),
        }  # fmt: skip
        self.add(
            about, "same-bytes", f"one checkpoint fitted on {'wiki and novels' if known == KNOWN else 'all'}", found
        )

    def measured(self, mixture: Mixture, names: Sequence[str]) -> tuple[dict, dict]:
        """Losses of all choices on the held-out windows, and of ensembles of the first ones; kept on disk."""
        kept = RUNS / "tested" / f"{mixture.folder.name}.safetensors"
        ensembles = {f"mean of {count}": names[:count] for count in range(2, len(names) + 1)}
        if not kept.is_file():
            models = {}
            for name in names:
                model = mixture.use(name)
                models[name] = LayerwiseModel(model), final_hidden(model, list(self.test), quiet)
            tensors = {}
            for cut in self.test:
                one = {name: (stages, hidden[cut.name]) for name, (stages, hidden) in models.items()}
                for name, found in compared(cut, one, self.reference, ensembles).items():
                    tensors |= found.tensors(f"{name}.{cut.name}")
            kept.parent.mkdir(exist_ok=True)
            save_file(tensors, kept)
        tensors = load_file(kept)

        def of(name: str) -> dict[str, TokenLosses]:
            return {cut.name: TokenLosses.among(tensors, f"{name}.{cut.name}") for cut in self.test}

        return {name: of(name) for name in names}, {len(ensembles[name]): of(name) for name in ensembles}

    def routed(
        self, case: Case, count: int, kind: str, labels: str = "divergence", without: str = ""
    ) -> tuple[TrainedRouter, dict[str, Tensor]]:
        """A router for the first variants, trained without a text if one is named, and what it chooses on all texts."""
        names = [name for name in case.names if name != without][:count]
        cuts = [cut for cut in case.train if cut.name != without]
        mixture = open_mixture(case.folder, kernels="reference")
        model = mixture.model_of(mixture.record.router.base)
        what = ROUTERS.find(kind).reads
        samples = RouterSamples.of(
            read(model, torch.cat([cut.inputs for cut in cuts]), what),
            torch.stack([torch.cat([getattr(case.learn[n][c.name], labels) for c in cuts]) for n in names]),
        )
        held = torch.cat([held_out_windows(len(cut.inputs)) for cut in cuts])
        means = samples.some(held).at_cuts.mean((0, 1))
        default = int(means.argmin())
        trained = train(kind, samples.some(~held), samples.some(held), default=default, seed=0, report=quiet)
        picks = {}
        with torch.no_grad():
            for cut in case.test:
                shares = trained.router.after(read(model, cut.inputs[:, :PROMPT], what)).softmax(-1)
                picks[cut.name] = chosen(shares, trained.threshold, default)
        return trained, picks

    def add(self, about: dict[str, Any], kind: str, name: str, values: dict[str, Any]) -> None:
        """Rows of one way to answer, from losses of tokens, or from means over continuations."""
        for text, value in values.items():
            divergence, likelihood, right = value if isinstance(value, tuple) else means(value)
            self.rows.append(about | {
                "kind": kind, "name": name, "distribution": text, "role": about["roles"][text],
                "kl_divergence": float(divergence.mean()), "perplexity": float(likelihood.mean().exp()),
                "top1": float(right.mean()),
                "interval": 1.96 * float(divergence.std()) / len(divergence) ** 0.5,
                "per_input": [round(v, 7) for v in divergence.tolist()],
            })  # fmt: skip

    def ways(
        self, case: Case, about: dict[str, Any], count: int, routers: Sequence[tuple[str, str]], without: str = ""
    ) -> dict[str, Router]:
        """Rows of all ways to answer with the first variants; for routers, their kind and the loss of their labels.

        Returns:
            The routers.
        """
        names = [name for name in case.names if name != without][:count]
        shown = [cut.name for cut in case.test if not without or cut.name == without]
        table = {t: [means(case.found[n][t]) for n in names] for t in shown}
        about = about | {"variants": len(names)}

        def picked(choice: dict[str, Tensor]) -> dict[str, Any]:
            return {
                t: tuple(torch.stack(parts).gather(0, choice[t][None])[0] for parts in zip(*table[t], strict=True))
                for t in shown
            }

        for index, name in enumerate(names):
            self.add(about, "variant", name, {t: table[t][index] for t in shown})
        for role in dict.fromkeys(about["roles"][t] for t in shown):  # the best one by the texts that are scored
            mine = [t for t in shown if about["roles"][t] == role]
            single = min(range(len(names)), key=lambda i: sum(float(table[t][i][0].mean()) for t in mine))
            self.add(about, "best-single", names[single], {t: table[t][single] for t in mine})
        uniform = {t: tuple(torch.stack(parts).mean(0) for parts in zip(*table[t], strict=True)) for t in shown}
        self.add(about, "uniform-routing", "any", uniform)
        if not without:
            self.add(about, "ensemble", f"mean of {count}", case.ensembles[count])
        made = {}
        for kind, labels in routers:
            trained, choice = self.routed(case, count, kind, labels, without)
            used = {t: (torch.bincount(choice[t], minlength=len(names)) / len(choice[t])).tolist() for t in shown}
            size = sum(tensor.numel() * tensor.element_size() for tensor in stored(trained.router).values())
            sizes = {key: about[key] - about["router_bytes"] + size for key in ("bytes_total", "bytes_resident")}
            more = {"labels": labels, "threshold": trained.threshold, "router_bytes": size, **sizes}
            made[kind] = trained.router
            name = kind if labels == "divergence" else f"{kind}, labels by likelihood"
            self.add(about | more, "router", name, picked(choice))
            for row in self.rows[-len(shown) :]:
                row["usage"] = dict(zip(names, used[row["distribution"]], strict=True))
        best = {t: torch.stack([one[0] for one in table[t]]).argmin(0) for t in shown}
        self.add(about, "oracle", "best of each prompt", picked(best))
        if "base" in names:
            right = {t: torch.full_like(best[t], names.index(t) if t in names else 0) for t in shown}
            self.add(about, "always-right", "each text's own", picked(right))
        return made


def means(found: TokenLosses | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """[prompts] means over the continuation of each window."""
    if isinstance(found, tuple):
        return found
    kinds = (found.divergence, found.likelihood, found.right)
    return tuple(kind[:, PROMPT - 1 :].float().mean(1) for kind in kinds)


def latency(folder: Path, routers: dict[str, Router]) -> dict[str, Any]:
    """Median microseconds of routes, of reading a prompt, and of that and writing 32 tokens, on native kernels."""
    mixture = open_mixture(folder)
    model, tokenizer = mixture.use(mixture.record.router.base), load_tokenizer(MODEL)
    text = texts("test", ("wiki",))[0].texts[0]

    @torch.inference_mode()
    def route(router: Router, ids: list[int]) -> Tensor:
        return router.after(read(model, prompt_end(ids), router.reads)).softmax(-1)

    def answer(ids: list[int], tokens: int) -> list:
        return list(generate(model, tokenizer, ids, Sampling(max_tokens=tokens, temperature=0)))

    found = {}
    for length in (64, 256):
        ids = tokenizer(text[: 8 * length]).input_ids[:length]
        calls = {kind: lambda _, r=router, ids=ids: route(r, ids) for kind, router in routers.items()}
        calls |= {"prompt": lambda _, ids=ids: answer(ids, 1), "answer": lambda _, ids=ids: answer(ids, 32)}
        found[str(length)] = take_turns(calls, rounds=15)
    return found


def json_kept(path: Path, make: Callable[[], Any]) -> Any:
    """What a file holds; it is made if there is none."""
    if not path.is_file():
        path.write_text(json.dumps(make(), indent=1) + "\n")
    return json.loads(path.read_text())


def sizes_of(folder: Path) -> dict[str, Any]:
    """Bytes of a mixture, for its rows."""
    account = open_mixture(folder, verify=False).record.account
    return {"bytes_total": account.total, "bytes_resident": account.resident, "router_bytes": account.router}


def adjusted_case(study: Study, bits: float) -> tuple[Case, dict[str, Any]]:
    """Adjustments of one base, measured, and what all their rows say."""
    specs = adjusted(bits)
    out = built(f"adjusted-{bits:g}", specs, ALL, "linear", "divergence", 64)
    return study.case(out, list(specs), ALL, 64), {
        "model": "reference MoE, adjustments", "bits": bits, **sizes_of(out), "roles": dict.fromkeys(ALL, "known"),
        "base_bytes": open_mixture(out, verify=False).record.variants["base"].bytes,
    }  # fmt: skip


def adjustments(study: Study, bits: float) -> None:
    """All ways to answer with adjustments of one base, and all routers among them."""
    case, about = adjusted_case(study, bits)
    own = LayerwiseModel(study.view.model)
    originals = {
        cut.name: compared(cut, {"": (own, study.reference.hidden[cut.name])}, study.reference)[""]
        for cut in study.test
    }
    study.add(about | {"variants": 1}, "original", "in 16 bits", originals)
    everything = [(kind, "divergence") for kind in ROUTERS] + [("linear", "likelihood")]
    routers = study.ways(case, about, len(case.names), everything)
    study.spent = json_kept(RUNS / "latency.json", lambda: latency(case.folder, routers))


def fewer_adjustments(study: Study, bits: float) -> None:
    """Two to four adjustments, and texts that are left out."""
    case, about = adjusted_case(study, bits)
    for count in range(2, len(case.names)):
        study.ways(case, about, count, [("linear", "divergence")])
    for name in NOVEL:
        study.ways(case, about | {"roles": {name: "novel"}}, 4, [("linear", "divergence")], without=name)


def checkpoints(study: Study, bits: int) -> None:
    """All rows of whole checkpoints of a width."""
    specs = whole(bits)
    out = built(f"whole-{bits}", specs, FITTED, "linear", "divergence", 32)
    case = study.case(out, list(specs), FITTED, 32)
    about = {
        "model": "reference MoE, checkpoints", "bits": bits, **sizes_of(out),
        "roles": {name: "known" if name in FITTED else "novel" for name in ALL},
    }  # fmt: skip
    for count in range(2, len(case.names) + 1):
        kinds = ["linear"] if count < len(case.names) else list(ROUTERS)
        study.ways(case, about, count, [(kind, "divergence") for kind in kinds])


PARTS: dict[str, Callable[[Study], None]] = {
    f"adjusted-{CONTROLLED:g}": partial(adjustments, bits=CONTROLLED),
    f"fewer-{CONTROLLED:g}": partial(fewer_adjustments, bits=CONTROLLED),
    **{f"whole-{bits}": partial(checkpoints, bits=bits) for bits in BITS},
    "single-known": partial(Study.control, known=KNOWN), "single-all": partial(Study.control, known=ALL),
    **{f"{name}-{bits:g}": partial(make, bits=bits) for bits in ADJUSTED if bits != CONTROLLED
       for name, make in (("adjusted", adjustments), ("fewer", fewer_adjustments))},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Mixtures on the reference model.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"to measure, of {', '.join(PARTS)}; all by default")
    wanted = parser.parse_args().parts or list(PARTS)
    if unknown := set(wanted) - PARTS.keys():
        parser.error(f"{min(unknown)} is no part: known are {', '.join(PARTS)}")
    torch.manual_seed(0)
    RUNS.mkdir(parents=True, exist_ok=True)
    study = Study(windows=24)
    if (RUNS / "latency.json").is_file():
        study.spent = json.loads((RUNS / "latency.json").read_text())
    for name, measure in PARTS.items():
        study.part(name, measure, name in wanted)
    study.store("the page is written")


if __name__ == "__main__":
    main()
