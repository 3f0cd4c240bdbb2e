"""Statistics of some distributions: a forward pass for significance, a backward pass for sensitivity, by block."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moqa.execution import Executor, Workspace
from moqa.profiling.passes import BlockPass, ProfiledSamples, go_back, go_forward
from moqa.profiling.sensitivity import ErrorSettings, all_widths
from moqa.progress import Report

# distribution -> name -> tensor
Statistics = dict[str, dict[str, Tensor]]


class Measurement:
    """A measurement of a model on some distributions; finished steps survive a kill.

    >>> from moqa.execution import LocalExecutor
    >>> from moqa.methods import METHODS
    >>> errors = ErrorSettings.of(profile.record.settings, METHODS["rtn"], experts=16)
    >>> measurement = Measurement(workspace, {"wiki": tokens}, errors, 0, LocalExecutor())
    >>> statistics, weights = measurement.run(report)
    >>> statistics["wiki"]["sensitivity"].shape
    torch.Size([312, 8])

    Hidden states of all blocks are saved on disk: significance is measured on the way forward, sensitivity on the way
    back.

    Args:
        workspace: the original model, and the folder of unfinished work.
        samples: distribution name -> what the model is called with, e.g. [windows, context] token ids.
        how: how errors are made and measured.
        seed: of the labels that are drawn from the model's own predictions.
        engine: does the passes; within one block, distributions do not wait for each other.
    """

    def __init__(
        self, workspace: Workspace, samples: Mapping[str, Tensor], how: ErrorSettings, seed: int, engine: Executor
    ) -> None:
        self._workspace, self._how, self._seed, self._engine = workspace, how, seed, engine
        self._shapes = {name: (tuple(tokens.shape), tokens.dtype) for name, tokens in samples.items()}
        self._flows = {name: ProfiledSamples.of(workspace, name, tokens) for name, tokens in samples.items()}

    def run(self, report: Report) -> tuple[Statistics, dict[str, Tensor]]:
        """Measure everything that is not measured yet.

        Returns:
            Distribution -> name -> tensor: `layer.3.channel`, ..., `layer.3.gradient_rows` and `layer.3.gradient_rest`
            (`moqa.calibration.outputs.Gradients`), `sensitivity` [units, widths], and `folds` [folds, units, widths],
            what each fold of the samples adds to it; and statistics of the weights: `rounding` [units, widths], the
            relative squared rounding error, `layer.3.similarity`, and `compared` [units, others]
            (`moqa.profiling.sensitivity.compared_errors`).
        """
        stages, work = self._workspace.stages, self._workspace.work
        depth = stages.depth
        for layer in range(depth):
            if work.done(f"forward-{layer}") is None:
                report("activation", layer, depth, layer=layer)
                # the last pass looks at the weights alone
                self._work(go_forward, [*self._passes(layer), BlockPass(layer, self._how)])
                work.mark_done(f"forward-{layer}", {})
        report("activation", depth, depth)
        if self._how.probes:
            self._go_back(report)
        return self._gathered()

    def _go_back(self, report: Report) -> None:
        stages, work = self._workspace.stages, self._workspace.work
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
        for _ in self._engine.map(work, self._workspace, passes):
            pass

    def _gathered(self) -> tuple[Statistics, dict[str, Tensor]]:
        depth, load = self._workspace.stages.depth, self._workspace.work.load
        weights = {layer: load(f"weights-{layer}") for layer in range(depth)}
        relative = torch.cat([weights[layer]["rounding"] for layer in range(depth)])
        statistics: Statistics = {}
        for name in self._shapes:
            statistics[name] = {
                f"layer.{layer}.{key}": value
                for layer in range(depth)
                for key, value in load(f"statistics-{layer}-{name}").items()
            }
            if self._how.probes:
                back = [load(f"sensitivity-{layer}-{name}") for layer in range(depth)]
                folds = torch.cat([found.pop("sensitivity") for found in back], 1)
                tables = [
                    all_widths(probed, relative, self._how.probes, self._how.widths)
                    for probed in (folds.sum(0), *folds)
                ]
                statistics[name] |= {"sensitivity": tables[0], "folds": torch.stack(tables[1:])}
                statistics[name] |= {
                    f"layer.{layer}.{key}": value for layer, found in enumerate(back) for key, value in found.items()
                }
        similar = {f"layer.{n}.similarity": w["similarity"] for n, w in weights.items() if "similarity" in w}
        compared = [weights[layer]["compared"] for layer in range(depth) if "compared" in weights[layer]]
        return statistics, {"rounding": relative, **({"compared": torch.cat(compared)} if compared else {}), **similar}
