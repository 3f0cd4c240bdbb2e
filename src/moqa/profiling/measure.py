"""Statistics of some distributions: a pass forward for significance, a pass back for sensitivity, layer by layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moqa.execution import Executor, Workspace
from moqa.profiling.passes import BlockPass, ErrorSettings, ProfiledSamples, go_back, go_forward
from moqa.profiling.sensitivity import all_widths
from moqa.progress import Report


@dataclass(frozen=True)
class ProfileTables:
    """What was measured.

    Attributes:
        statistics: distribution -> name (`layer.3.channel`, ..., `sensitivity` [units, widths]) -> tensor.
        weights: `rounding` [units, widths], the relative squared rounding error, and `layer.3.similarity`.
    """

    statistics: dict[str, dict[str, Tensor]]
    weights: dict[str, Tensor]


class Measurement:
    """A measurement of a model on some distributions; what is done of it survives a kill.

    >>> measured = Measurement(site, {"wiki": tokens}, how, 0, LocalEngine()).run(report)

    Hidden states of all layers lie on disk: significance is measured on the way forward, sensitivity on the way back.

    Args:
        site: the original model, and where everything is put aside.
        samples: distribution name -> [windows, context] token ids.
        how: errors are made and measured.
        seed: of the labels that are drawn from the model's own predictions.
        engine: what goes through the layers; distributions do not wait for each other within one.
    """

    def __init__(
        self, site: Workspace, samples: Mapping[str, Tensor], how: ErrorSettings, seed: int, engine: Executor
    ) -> None:
        self._site, self._how, self._seed, self._engine = site, how, seed, engine
        self._shapes = {name: (tuple(tokens.shape), tokens.dtype) for name, tokens in samples.items()}
        self._flows = {
            name: site.once(("flow", name), partial(ProfiledSamples, name, tokens, site.stages, site.work))
            for name, tokens in samples.items()
        }

    def run(self, report: Report) -> ProfileTables:
        """Measure what is not measured yet."""
        stages, work = self._site.stages, self._site.work
        depth = stages.depth
        for layer in range(depth):
            if work.done(f"forward-{layer}") is None:
                report("activation", layer, depth, layer=layer)
                # the last pass is that of the weights alone
                self._work(go_forward, [*self._passes(layer), BlockPass(layer, self._how)])
                work.mark_done(f"forward-{layer}", {})
        report("activation", depth, depth)
        if self._how.probes:
            self._go_back(report)
        return self._gathered()

    def _go_back(self, report: Report) -> None:
        stages, work = self._site.stages, self._site.work
        depth = stages.depth
        if work.done("labels") is None:
            generator = torch.Generator().manual_seed(self._seed)
            for flow in self._flows.values():
                flow.draw_labels(stages, generator)
            work.mark_done("labels", {})
        for layer in reversed(range(depth)):
            if work.done(f"backward-{layer}") is None:
                report("sensitivity", depth - 1 - layer, depth, layer=layer)
                self._work(go_back, self._passes(layer))
                work.mark_done(f"backward-{layer}", {})
                for flow in self._flows.values():
                    flow.forget(layer)
        report("sensitivity", depth, depth)

    def _passes(self, layer: int) -> list[BlockPass]:
        return [BlockPass(layer, self._how, name, *shape) for name, shape in self._shapes.items()]

    def _work(self, work: Callable[[Workspace, BlockPass], None], passes: Sequence[BlockPass]) -> None:
        for _ in self._engine.map(work, self._site, passes):
            pass

    def _gathered(self) -> ProfileTables:
        depth, load = self._site.stages.depth, self._site.work.load
        weights = {layer: load(f"weights-{layer}") for layer in range(depth)}
        relative = torch.cat([weights[layer]["rounding"] for layer in range(depth)])
        found: dict[str, dict[str, Tensor]] = {}
        for name in self._shapes:
            found[name] = {
                f"layer.{layer}.{key}": value
                for layer in range(depth)
                for key, value in load(f"statistics-{layer}-{name}").items()
            }
            if self._how.probes:
                probed = torch.cat([load(f"sensitivity-{layer}-{name}")["sensitivity"] for layer in range(depth)])
                found[name]["sensitivity"] = all_widths(probed, relative, self._how.probes, self._how.widths)
        similar = {f"layer.{n}.similarity": w["similarity"] for n, w in weights.items() if "similarity" in w}
        return ProfileTables(found, {"rounding": relative, **similar})
