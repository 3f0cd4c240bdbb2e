"""The key-value cache of one text, so that no token is read twice."""

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moqa.errors import MoqaError
from moqa.runtime.decoder import FusedDecoder
from moqa.runtime.growing import GrowingLayer, cache_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PromptCache:
    """Tokens that were read, and the key-value cache that they produced.

    >>> memory = PromptCache()
    >>> memory.keep([5, 6, 7])
    0
    >>> logits = memory.read(model, torch.tensor([[5, 6, 7]]))
    >>> memory.keep([5, 6, 7, 8])
    3
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.reused = 0  # tokens in the cache after the last `keep`
        self._cache: Any = None

    def keep(self, ids: Sequence[int]) -> int:
        """Keep only the common beginning with another text; at least the last token of that text remains to be read.

        Args:
            ids: tokens of the other text, one or more.

        Returns:
            How many of its tokens are in the cache.
        """
        pairs = zip(ids[:-1], self.ids, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        surplus = len(self.ids) - same
        if surplus and self._can_crop():
            self._cache.crop(-surplus)
            del self.ids[same:]
        elif surplus:
            self.clear()
        self.reused = len(self.ids)
        return self.reused

    def read(self, model: "PreTrainedModel", ids: Tensor, each: bool = False) -> Tensor:
        """Read more tokens.

        Args:
            model: the model; the same in every call.
            ids: [1, tokens] int64, one or more.
            each: return logits after each of them.

        Returns:
            [vocabulary] logits of the next token, or [tokens, vocabulary]; float32 on the CPU.

        Raises:
            MoqaError: if the model has no key-value cache.
        """
        fused = FusedDecoder.of(model)
        if self._cache is None:
            self._cache = cache_for(model) or (fused.cache() if fused is not None else None)
        try:
            if fused is not None and ids.shape[1] == 1 and self.ids and not each:
                logits = fused.step(int(ids), self._cache)
                self.ids.append(int(ids))
                return logits
            with torch.inference_mode():
                out = model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=0 if each else 1)
                logits = (out.logits[0] if each else out.logits[0, -1]).float().cpu()
        except BaseException:
            # some layers may have read the tokens and others not
            self.clear()
            raise
        if out.past_key_values is None:
            raise MoqaError(
                f"a {model.config.model_type} model keeps no key-value cache", "moqa cannot generate with it"
            )
        self._cache = out.past_key_values
        self.ids += ids[0].tolist()
        return logits

    def clear(self) -> None:
        """Forget everything."""
        self.ids, self._cache = [], None

    def _can_crop(self) -> bool:
        from transformers.cache_utils import DynamicLayer

        # sliding windows and recurrent states no longer contain what an earlier position needs
        return all(type(layer) in (DynamicLayer, GrowingLayer) for layer in self._cache.layers)
