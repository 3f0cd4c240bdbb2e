"""Text that a model writes itself so that it uses all of its experts alike."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from moqa.models.experts import ExpertRun, observed
from moqa.models.view import ModelView

# candidates of a window, and the temperature of the imbalance, as published
BEAM, TEMPERATURE = 4, 1.2
# windows that are written at a time: each has BEAM * BEAM candidates
_BATCH = 8


@torch.no_grad()
def balanced_sample(view: ModelView, windows: int, context: int, seed: int, start: Sequence[int] = ()) -> Tensor:
    """Windows that the model thinks likely and that use its experts evenly, by a beam search over both.

    Each window begins with a random token (after the start of a prompt, if there is one). Every candidate is continued
    by its likeliest next tokens; kept are those with the least `-mean log p + imbalance / TEMPERATURE`.

    >>> balanced_sample(view, windows=2, context=8, seed=0).shape
    torch.Size([2, 8])

    Args:
        view: the original model, which has experts.
        windows: number of windows.
        context: tokens in each.
        seed: of the first tokens.
        start: tokens that begin every window.

    Returns:
        [windows, context] token ids, int64.

    MoEQuant (arXiv 2505.03804), expert-balanced self-sampling, algorithm 1; the imbalance of a candidate is the mean
    over its blocks of `imbalance`, and only its likeliest tokens are tried.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = view.model.get_input_embeddings().num_embeddings
    written = []
    for done in range(0, windows, _BATCH):
        first = torch.randint(vocabulary, (min(_BATCH, windows - done), 1), generator=generator)
        begin = torch.cat([torch.tensor(start, dtype=torch.int64).expand(len(first), -1), first], 1)
        written.append(_written(view, begin[:, :context], context))
    return torch.cat(written)


def imbalance(counts: Tensor) -> Tensor:
    """Spread of the shares of experts: root of E / (E - 1) times the sum of their squared distances from the mean.

    >>> imbalance(torch.tensor([[2.0, 2.0], [4.0, 0.0]]))
    tensor([0., 1.])

    Args:
        counts: [..., experts] tokens that each expert gets, float32.

    MoEQuant (arXiv 2505.03804), equation of sigma.
    """
    experts = counts.shape[-1]
    shares = counts / counts.sum(-1, keepdim=True).clamp_min(1)
    distance = (shares - 1 / experts).square().sum(-1)
    return (distance * experts / max(experts - 1, 1)).sqrt()


def expert_counts(view: ModelView, inputs: Tensor) -> Tensor:
    """[blocks with experts, experts] tokens that each expert gets while the model reads some windows, float32.

    >>> expert_counts(view, tokens).sum(1)[0] == tokens.numel() * view.top_k
    tensor(True)
    """
    with torch.no_grad(), _counting(view) as counter:
        for batch in view.task.batches(inputs):
            view.model(batch)
            counter.add(len(batch))
    return counter.counts.sum(0)


class _Counter:
    """Tokens of every expert in every block, for each sequence of a batch: [sequences, blocks, experts]."""

    def __init__(self, blocks: int, experts: int) -> None:
        self.counts = torch.zeros(1, blocks, experts)
        self._seen: list[Tensor] = [torch.zeros(0)] * blocks

    def routed(self, block: int, index: Tensor) -> None:
        """What a block's router chose: [tokens, top_k]."""
        self._seen[block] = index

    def last(self, sequences: int) -> Tensor:
        """[sequences, blocks, experts] of the last forward pass."""
        experts = self.counts.shape[-1]
        ones = [torch.nn.functional.one_hot(seen.reshape(sequences, -1).clamp_max(experts - 1), experts) for seen in
                self._seen]  # fmt: skip
        return torch.stack([found.sum(1) for found in ones], 1).float()

    def add(self, sequences: int) -> None:
        """Add the last forward pass to the counts of all."""
        self.counts = self.counts + self.last(sequences).sum(0)


class _BlockCounter:
    def __init__(self, counter: _Counter, block: int) -> None:
        self._counter, self._block = counter, block

    def routed(self, index: Tensor, weights: Tensor) -> None:  # noqa: ARG002
        self._counter.routed(self._block, index)

    def expert(self, run: ExpertRun) -> None:
        """See `ExpertsObserver`."""


@contextmanager
def _counting(view: ModelView) -> Iterator[_Counter]:
    layers = [layer for layer in range(len(view.blocks)) if view.experts_path(layer) is not None]
    counter = _Counter(len(layers), view.experts(layers[0]).num_experts)
    with ExitStack() as stack:
        for block, layer in enumerate(layers):
            stack.enter_context(observed(view.experts(layer), _BlockCounter(counter, block)))
        yield counter


def _written(view: ModelView, begin: Tensor, context: int) -> Tensor:
    """[windows, context] the best candidate of each window."""
    windows = len(begin)
    with _counting(view) as counter:
        result = view.model(begin, use_cache=True)
        counts = counter.last(windows)[:, None]  # [windows, candidates, blocks, experts]
        cache, tokens = result.past_key_values, begin[:, None]
        likely = result.logits[:, -1].float().log_softmax(-1)[:, None]  # [windows, candidates, vocabulary]
        total = torch.zeros(windows, 1)
        while tokens.shape[2] < context:
            candidates = tokens.shape[1]
            top, choice = likely.topk(BEAM, dim=-1)  # [windows, candidates, BEAM]
            total = (total[..., None] + top).flatten(1)
            tokens = torch.cat([tokens.repeat_interleave(BEAM, 1), choice.flatten(1)[..., None]], 2)
            # every continuation is read: that gives its routing, and the next tokens of those that are kept
            cache.batch_repeat_interleave(BEAM)
            result = view.model(tokens[..., -1].reshape(-1, 1), past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            used = counter.last(windows * candidates * BEAM).unflatten(0, (windows, -1))
            counts = counts.repeat_interleave(BEAM, 1) + used
            score = -total / (tokens.shape[2] - begin.shape[1]) + imbalance(counts).mean(-1) / TEMPERATURE
            kept = score.topk(min(BEAM, score.shape[1]), largest=False, sorted=True).indices
            rows = (kept + torch.arange(windows)[:, None] * score.shape[1]).flatten()
            cache.batch_select_indices(rows)
            total, counts, tokens = (_picked(x, kept) for x in (total, counts, tokens))
            likely = result.logits[rows, -1].float().log_softmax(-1).unflatten(0, (windows, -1))
    return tokens[:, 0]


def _picked(values: Tensor, kept: Tensor) -> Tensor:
    """Values [windows, candidates, ...] of the candidates that are kept."""
    return torch.stack([row[index] for row, index in zip(values, kept, strict=True)])
