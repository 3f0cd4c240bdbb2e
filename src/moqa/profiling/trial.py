"""A trial of profiling one block: both passes and the model's own text on a few samples, timed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moqa.execution import Workspace
from moqa.forecast.rates import ProfileRates, TokenCost
from moqa.forecast.samples import states_in_front
from moqa.forecast.stopwatch import Stopwatch
from moqa.models.view import ModelView
from moqa.profiling.passes import BlockPass, ErrorSettings, ProfiledSamples, go_back, go_forward
from moqa.profiling.selfsample import OWN_BATCH, draw

# decoding steps that are timed
_STEPS = 4


@dataclass(frozen=True)
class ProfileTrial:
    """Profiles single blocks on two distributions, one of few samples and one of more.

    Args:
        workspace: the model, and a work folder that is thrown away.
        how: how errors are made and measured.
        few: the smaller distribution.
        more: the larger one.
    """

    workspace: Workspace
    how: ErrorSettings
    few: Tensor
    more: Tensor

    def layer(self, layer: int, few_experts: Sequence[int], watch: Stopwatch) -> ProfileRates:
        """Rates of a block; errors are made for `few_experts` only."""
        names = {"few": self.few, "more": self.more}
        for name, tokens in names.items():
            self._place(layer, name, tokens)
        weights = watch.seconds(lambda: go_forward(self.workspace, BlockPass(layer, self.how)))
        counts = [self.workspace.stages.task.count(tokens) for tokens in names.values()]

        def forward(name: str) -> float:
            given = BlockPass(layer, self.how, name)
            return watch.seconds(lambda: self._flushed(lambda: go_forward(self.workspace, given)))

        first, second = (forward(name) for name in names)
        rates = ProfileRates(weights, _line(counts, [first, second]))
        if not self.how.probes:
            return rates

        def back(name: str, experts: Sequence[int], together: int) -> float:
            how = replace(self.how, experts=together)
            given = BlockPass(layer, how, name, experts=tuple(experts))
            return watch.seconds(lambda: self._flushed(lambda: go_back(self.workspace, given)))

        linear = [back(name, (), 1) for name in names]
        rates = replace(rates, back=_line(counts, linear))
        if not few_experts:
            return rates
        routed = [back(name, few_experts, len(few_experts)) for name in names]
        each = [
            (with_experts - without) / len(few_experts) for with_experts, without in zip(routed, linear, strict=True)
        ]
        rates = replace(rates, back_expert=_line(counts, each))
        if len(few_experts) > 1:
            halves = back("few", few_experts, -(-len(few_experts) // 2))
            rates = replace(rates, back_slice=TokenCost(0.0, max(halves - routed[0], 0.0) / counts[0]))
        return rates

    def labels(self, watch: Stopwatch) -> TokenCost:
        """Cost of drawing labels, per token of a distribution."""
        flow, stages = self._flow("few", self.few), self.workspace.stages
        for number in flow.measured:
            states = states_in_front(stages, self.few[len(self.few) // 2 :], (stages.depth,))
            flow.hidden.put(stages.depth, number, states[stages.depth])
        generator = torch.Generator().manual_seed(0)
        return TokenCost(0.0, watch.seconds(lambda: flow.draw_labels(stages, generator)) / stages.task.count(self.few))

    def _place(self, layer: int, name: str, tokens: Tensor) -> None:
        """Save samples at the input of a block, and gradients at its output."""
        flow = self._flow(name, tokens)
        # half of the samples are a batch to calibrate on, the other half one to measure on
        for number, inputs in enumerate(tokens.chunk(2)):
            states = states_in_front(self.workspace.stages, inputs, (layer, layer + 1))
            flow.hidden.put(layer, number, states[layer])
            if number in flow.measured:
                flow.put_gradient(layer + 1, number, torch.randn_like(states[layer + 1]))

    def _flow(self, name: str, tokens: Tensor) -> ProfiledSamples:
        stages, work = self.workspace.stages, self.workspace.work
        return self.workspace.once(("flow", name), lambda: ProfiledSamples(name, tokens, stages, work))

    def _flushed(self, work: Callable[[], None]) -> None:
        work()
        self.workspace.work.flush()


@torch.no_grad()
def try_self_sampling(
    view: ModelView, firsts: Sequence[int], windows: int, context: int, watch: Stopwatch
) -> tuple[float, dict[int, float]]:
    """Seconds in which a model writes one token of each window: outside its blocks, and in some of them.

    Args:
        view: the model.
        firsts: indices of blocks, ascending; all blocks up to the last of them are read.
        windows: number of windows.
        context: tokens in each; the timed tokens are in the middle.
        watch: times the work.
    """
    # random tokens, because an expert that gets none would take no time
    shape = (min(windows, OWN_BATCH), max(1, context // 2))
    tokens = torch.randint(view.classes, shape, generator=torch.Generator().manual_seed(0))
    with view.held(range(firsts[-1] + 1)):
        depths = sorted({0, *firsts, *(layer + 1 for layer in firsts)})
        found = {depth: _step(view, depth, tokens, watch) for depth in depths}
    return found[0], {layer: max(found[layer + 1] - found[layer], 0.0) for layer in firsts}


def _step(view: ModelView, depth: int, tokens: Tensor, watch: Stopwatch) -> float:
    cache = None
    generator = torch.Generator().manual_seed(0)
    with _first_layers(view, depth):
        for part in tokens.split(max(1, view.task.batch_size // len(tokens)), 1):
            cache = view.model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

        def write() -> None:
            for _ in range(_STEPS):
                result = view.model(tokens[:, :1], past_key_values=cache, use_cache=True)
                draw(result.logits[:, -1], generator)

        return watch.seconds(write) / _STEPS


@contextmanager
def _first_layers(view: ModelView, count: int) -> Iterator[None]:
    """A `with` block in which a model ends after its first blocks."""
    lists = ((module, getattr(module, "layers", None)) for module in view.model.modules())
    owner, layers = next(
        (module, found) for module, found in lists if isinstance(found, nn.ModuleList) and [*found] == view.blocks
    )
    owner.layers = layers[:count]
    try:
        yield
    finally:
        owner.layers = layers


def _line(counts: Sequence[int], seconds: Sequence[float]) -> TokenCost:
    return TokenCost.through((counts[0], seconds[0]), (counts[1], seconds[1]))
