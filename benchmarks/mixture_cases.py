"""Ways to answer with a mixture, measured: every variant, the best one, chance, ensembles, routers, and the oracle."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from demo import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor

from moqa.data import Source
from moqa.evaluation.measure import Reference, final_hidden
from moqa.mixture.features import read
from moqa.mixture.finish import held_out_windows
from moqa.mixture.load import Mixture, open_mixture
from moqa.mixture.losses import LossStore
from moqa.mixture.measure import TokenLosses, compared
from moqa.mixture.router import ROUTERS, Router, stored
from moqa.mixture.threshold import TrainedRouter, train
from moqa.mixture.train import RouterSamples, chosen
from moqa.models.layerwise import LayerwiseModel
from moqa.models.view import ModelView, open_model
from moqa.progress import quiet
from moqa.tasks import Samples

RUNS = ROOT / "runs" / "mixture"
MEASURED = RUNS / "measured"
CONTEXT, PROMPT = 256, 64  # tokens of a window, and of its prompt


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


@dataclass
class Case:
    """A mixture, measured: the losses of its variants on the router's samples and on held-out ones.

    Attributes:
        folder: of the mixture.
        names: its choices.
        train: samples of the router.
        learn: losses of each variant on them.
        test: held-out samples.
        found: losses of each variant on them.
        ensembles: of the first variants: their number -> losses of the mean of their logits.
    """

    folder: Path
    names: list[str]
    train: list[Samples]
    learn: dict[str, dict[str, TokenLosses]]
    test: list[Samples]
    found: dict[str, dict[str, TokenLosses]]
    ensembles: dict[int, dict[str, TokenLosses]]


class Study:
    """All cases on one original; adds rows.

    Args:
        rows: of all originals.
        model: folder of the original.
        held_out: that everything is measured on.
        count: windows, or images, of each.
        prompt: tokens of a window that routers read; 0: images.
    """

    def __init__(self, rows: list[dict[str, Any]], model: Path, held_out: Sequence[Source], count: int, prompt: int):
        self.rows, self.prompt = rows, prompt
        self.view: ModelView = open_model(model)
        self.reader = self.view.task.reader(model)
        self.test = [self.view.task.cut(source, self.reader, CONTEXT, count) for source in held_out]

    @cached_property
    def reference(self) -> Reference:
        """The original's outputs on the held-out samples."""
        return Reference.of(self.view.model, list(self.test), quiet)

    def case(self, folder: Path, names: list[str], known: Sequence[Source], samples: int, measured: Path) -> Case:
        """Measure a mixture on the held-out samples, with variants that its own router does not choose."""
        mixture = open_mixture(folder, kernels="reference")
        parts = [self.view.task.split(source)[1] for source in known]
        cuts = [self.view.task.cut(part, self.reader, CONTEXT, samples) for part in parts]
        of = {n: v.of or n for n, v in mixture.record.variants.items()}
        of = dict(sorted(of.items(), key=lambda pair: pair[0] != pair[1]))
        learn = LossStore(measured / "losses", cuts).all(folder, of, self.view, quiet)
        return Case(folder, names, cuts, learn, self.test, *self.measured(mixture, names))

    def heard(self, inputs: Tensor) -> Tensor:
        """The part of samples that routers read."""
        return inputs[:, : self.prompt] if self.prompt else inputs

    def means(self, found: TokenLosses | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """[prompts] means over the continuation of each window; of images, their losses."""
        if isinstance(found, tuple):
            return found
        kinds = (found.divergence, found.likelihood, found.right)
        return tuple(kind[:, max(self.prompt - 1, 0) :].float().mean(1) for kind in kinds)

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
            [len(cut.inputs) for cut in cuts],
        )
        held = torch.cat([held_out_windows(len(cut.inputs)) for cut in cuts])
        means = samples.some(held).at_cuts.mean((0, 1))
        default = int(means.argmin())
        trained = train(kind, samples.some(~held), samples.some(held), default=default, seed=0, report=quiet)
        picks = {}
        with torch.no_grad():
            for cut in case.test:
                found = trained.router.after(read(model, self.heard(cut.inputs), what))
                picks[cut.name] = chosen(found, trained.threshold, default)
        return trained, picks

    def add(self, about: dict[str, Any], kind: str, name: str, values: dict[str, Any]) -> None:
        """Rows of one way to answer, from losses of tokens, or from means over continuations."""
        for text, value in values.items():
            divergence, likelihood, right = value if isinstance(value, tuple) else self.means(value)
            self.rows.append(about | {
                "kind": kind, "name": name, "distribution": text, "role": about["roles"][text],
                "kl_divergence": float(divergence.mean()),
                "perplexity": float(likelihood.mean().exp()) if self.prompt else None,
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
        table = {t: [self.means(case.found[n][t]) for n in names] for t in shown}
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
            texts = [cut.name for cut in case.train if cut.name != without]
            more = {
                "labels": labels, "threshold": trained.threshold, "router_bytes": size, **sizes,
                "left_out": {texts[number]: change for number, change in trained.left_out.items()},
            }  # fmt: skip
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


def json_kept(path: Path, make: Callable[[], Any]) -> Any:
    """What a file holds; it is made if there is none."""
    if not path.is_file():
        path.write_text(json.dumps(make(), indent=1) + "\n")
    return json.loads(path.read_text())


def sizes_of(folder: Path) -> dict[str, Any]:
    """Bytes of a mixture, for its rows."""
    account = open_mixture(folder, verify=False).record.account
    return {"bytes_total": account.total, "bytes_resident": account.resident, "router_bytes": account.router}
