"""Text that a model writes itself: what it knows, without any text from outside."""

import torch
from torch import Tensor

from moqa.models.view import ModelView

# windows that are written at the same time
OWN_BATCH = 64


@torch.no_grad()
def self_sample(view: ModelView, windows: int, context: int, seed: int, batch: int = OWN_BATCH) -> Tensor:
    """Windows drawn from the model's own distribution, each from a random first token.

    >>> self_sample(view, windows=4, context=256, seed=0).shape
    torch.Size([4, 256])

    Args:
        view: the original model.
        windows: how many to draw.
        context: tokens in each.
        seed: of the draws.
        batch: windows written at the same time.

    Returns:
        [windows, context] token ids, int64.

    LLM-QAT (arXiv 2305.17888) and MoEQuant's EBSS (arXiv 2505.03804) calibrate on such text; a plan's hedge uses it
    as the stand-in for every text that is not known.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = view.model.get_input_embeddings().num_embeddings
    written = []
    for start in range(0, windows, batch):
        tokens = torch.randint(vocabulary, (min(batch, windows - start), 1), generator=generator)
        parts, cache = [tokens], None
        for _ in range(context - 1):
            result = view.model(parts[-1], past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            parts.append(draw(result.logits[:, -1], generator)[:, None])
        written.append(torch.cat(parts, 1))
    return torch.cat(written)


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row from the distribution that its logits describe.

    >>> draw(torch.tensor([[0.0, 100.0]]), torch.Generator())
    tensor([1])

    Args:
        logits: [rows, vocabulary].
        generator: of the draws.

    Returns:
        [rows] token ids, int64. One uniform number per row, not one per token as `torch.multinomial` takes.
    """
    cumulative = logits.float().softmax(-1).cumsum(-1)
    threshold = torch.rand(len(logits), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
