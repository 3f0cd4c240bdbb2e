"""A trial of profiling one block: both passes and the model's own text on a few samples, timed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moqa.execution import Workspace
from moqa.forecast.rates import BlockRates, TokenCost
from moqa.forecast.trial import Stopwatch, states_in_front
from moqa.models.view import ModelView
from moqa.profiling.passes import BlockPass, ProfiledSamples, go_back, go_forward, parts
from moqa.profiling.selfsample import OWN_BATCH, draw
from moqa.profiling.sensitivity import ErrorSettings

# decoding steps that are timed
_STEPS = 4


@dataclass(frozen=True)
class ProfileTrial:
    """Profiles single blocks on two distributions, one of few samples and one of more.

    Args:
        workspace: the model, and a work folder that is thrown away.
        how: how errors are made and measured.
        samples: of the distributions, the smaller one first.
        watch: times the work.
    """

    workspace: Workspace
    how: ErrorSettings
    samples: dict[str, Tensor]
    watch: Stopwatch

    def layer(self, layer: int, few_experts: Sequence[int], rates: BlockRates) -> None:
        """Fill in the rates of a block; errors are made for `few_experts` only."""
        for name in self.samples:
            self._place(layer, name)
        rates.weights = self.watch.seconds(lambda: go_forward(self.workspace, BlockPass(layer, self.how)))

        def back(name: str, experts: Sequence[int], together: int) -> float:
            how = replace(self.how, experts=together)
            return self._seconds(go_back, BlockPass(layer, how, name, experts=tuple(experts)))

        rates.forward = self._line([self._seconds(go_forward, BlockPass(layer, self.how, n)) for n in self.samples])
        if not self.how.probes:
            return
        linear = [back(name, (), 1) for name in self.samples]
        rates.back = self._line(linear)
        if not few_experts:
            return
        count = len(few_experts)
        routed = [back(name, few_experts, count) for name in self.samples]
        rates.back_expert = self._line([(more - less) / count for more, less in zip(routed, linear, strict=True)])
        if count > 1:
            few, tokens = next(iter(self.samples.items()))
            halves = back(few, few_experts, -(-count // 2))
            each = max(halves - routed[0], 0.0) / self.workspace.stages.task.count(tokens)
            rates.back_slice = TokenCost(0.0, each)

    def labels(self) -> TokenCost:
        """Cost of drawing labels, per token of a distribution."""
        name, tokens = next(iter(self.samples.items()))
        flow, stages = self._flow(name), self.workspace.stages
        for number in flow.measured:
            states = states_in_front(stages, parts(tokens)[1], (stages.depth,))
            flow.hidden.put(stages.depth, number, states[stages.depth])
        generator = torch.Generator().manual_seed(0)
        seconds = self.watch.seconds(lambda: flow.draw_labels(stages, generator))
        return TokenCost(0.0, seconds / stages.task.count(tokens))

    def _place(self, layer: int, name: str) -> None:
        """Save samples at the input of a block, and gradients at its output."""
        flow = self._flow(name)
        for number, inputs in enumerate(flow.batches):
            states = states_in_front(self.workspace.stages, inputs, (layer, layer + 1))
            flow.hidden.put(layer, number, states[layer])
            if number in flow.measured:
                flow.put_gradient(layer + 1, number, torch.randn_like(states[layer + 1]))

    def _flow(self, name: str) -> ProfiledSamples:
        return ProfiledSamples.of(self.workspace, name, self.samples[name])

    def _seconds(self, work: Callable[[Workspace, BlockPass], None], given: BlockPass) -> float:
        def saved() -> None:
            work(self.workspace, given)
            self.workspace.work.flush()

        return self.watch.seconds(saved)

    def _line(self, seconds: Sequence[float]) -> TokenCost:
        counts = [self.workspace.stages.task.count(tokens) for tokens in self.samples.values()]
        return TokenCost.through(*zip(counts, seconds, strict=True))


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
