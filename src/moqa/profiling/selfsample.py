"""Text that a model writes itself: a sample of what it knows, without any other text."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moqa.models.view import ModelView

# windows that are written at a time
OWN_BATCH = 64


@torch.no_grad()
def self_sample(view: ModelView, windows: int, context: int, seed: int, start: Sequence[int] = ()) -> Tensor:
    """Windows drawn from the model's own distribution, each from the start of a prompt or from a random token.

    >>> self_sample(view, windows=2, context=8, seed=0).shape
    torch.Size([2, 8])

    Args:
        view: the original model.
        windows: number of windows.
        context: tokens in each.
        seed: of the random draws.
        start: tokens that begin every window, see `moqa.data.prompt_start`; a random one if there are none.

    Returns:
        [windows, context] token ids, int64.

    LLM-QAT (arXiv 2305.17888) and MoEQuant's EBSS (arXiv 2505.03804) calibrate on such text; a plan's hedge uses it
    in place of all unknown text.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = view.model.get_input_embeddings().num_embeddings
    written = []
    for done in range(0, windows, OWN_BATCH):
        count = min(OWN_BATCH, windows - done)
        first = torch.randint(vocabulary, (count, 1), generator=generator)
        tokens = torch.tensor(start).expand(count, -1) if start else first
        parts, cache = [tokens], None
        for _ in range(context - tokens.shape[1]):
            result = view.model(parts[-1], past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            parts.append(draw(result.logits[:, -1], generator)[:, None])
        written.append(torch.cat(parts, 1))
    return torch.cat(written)


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token per row from the distribution of its logits.

    >>> draw(torch.tensor([[0.0, 100.0]]), torch.Generator())
    tensor([1])

    Args:
        logits: [rows, vocabulary].
        generator: random generator.

    Returns:
        [rows] token ids, int64. Each row takes one random number, not one per class as in `torch.multinomial`.
    """
    cumulative = logits.float().softmax(-1).cumsum(-1)
    threshold = torch.rand(len(logits), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
