"""What a model has read of one text, so that nothing is read twice."""

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moqa.errors import MoqaError
from moqa.runtime.decoder import FusedDecoder
from moqa.runtime.growing import GrowingLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PromptCache:
    """Tokens that were read, and the cache that transformers made of them.

    >>> memory = PromptCache()
    >>> memory.keep([5, 6, 7])
    0
    >>> logits = memory.read(model, torch.tensor([[5, 6, 7]]))
    >>> memory.keep([5, 6, 7, 8])
    3
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.reused = 0  # tokens that the last `keep` found read already
        self._cache: Any = None

    def keep(self, ids: Sequence[int]) -> int:
        """Forget what another text does not begin with; its last token is always left to read.

        Args:
            ids: tokens of the text, one or more.

        Returns:
            How many of its tokens are read already.
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

    def read(self, model: "PreTrainedModel", ids: Tensor) -> Tensor:
        """Read more tokens.

        Args:
            model: the same one every time.
            ids: [1, tokens] int64, one or more.

        Returns:
            [vocabulary] logits of the next token, float32 on the CPU.

        Raises:
            MoqaError: if the model keeps no cache of the usual kind.
        """
        fused = FusedDecoder.of(model)
        if fused is not None and self._cache is None:
            self._cache = fused.cache()
        try:
            if fused is not None and ids.shape[1] == 1 and self.ids:
                logits = fused.step(int(ids), self._cache)
                self.ids.append(int(ids))
                return logits
            with torch.inference_mode():
                out = model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
                logits = out.logits[0, -1].float().cpu()
        except BaseException:
            # some layers have read the tokens and others have not
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

        # windows and recurrent states have dropped what an earlier place would need
        return all(type(layer) in (DynamicLayer, GrowingLayer) for layer in self._cache.layers)
