"""Text that a model writes itself: what it knows, without any text from outside."""

import torch
from torch import Tensor

from moqa.models.view import ModelView


@torch.no_grad()
def self_sample(view: ModelView, windows: int, context: int, seed: int, batch: int = 64) -> Tensor:
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
            probabilities = result.logits[:, -1].float().softmax(-1)
            parts.append(torch.multinomial(probabilities, 1, generator=generator))
        written.append(torch.cat(parts, 1))
    return torch.cat(written)
