"""`moqa.generate`: continue a text with a model, or with the variant of a mixture that its router chooses."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moqa.errors import MoqaError
from moqa.generation import Piece, PromptCache, Sampling, encode
from moqa.generation import generate as with_model
from moqa.mixture.load import Mixture
from moqa.mixture.route import RoutedPrompt
from moqa.registry import check_known

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str | Sequence[int],
    sampling: Sampling | None = None,
    *,
    memory: PromptCache | None = None,
) -> Iterator[Piece]:
    """Continue a text, streamed in pieces.

    >>> pieces = list(moqa.generate(model, tokenizer, "The history of", Sampling(max_tokens=8, temperature=0)))
    >>> "".join(piece.text for piece in pieces)
    ' the ...'
    >>> pieces[-1].finish.finish_reason
    'length'

    Args:
        model: a causal language model of transformers, e.g. from `moqa.load`; of a mixture, the router chooses the
            variant.
        tokenizer: of the model.
        prompt: text, or its tokens.
        sampling: how to continue it; what it does not say, the model's generation_config.json does.
        memory: cache of an earlier text; a common beginning is not read again. It is updated. A mixture's variants do
            not share it: give none, or choose the variant (`model.mixture.use`).

    Returns:
        One piece per step (a chunk of the prompt, or a token); the last piece has `finish`.

    Raises:
        MoqaError: if the prompt is empty, has unknown tokens, or leaves too little of the context for the new tokens;
            if the grammar cannot be used; or if generation_config.json has a value out of range.
    """
    if memory is not None:
        return with_model(model, tokenizer, prompt, sampling, memory=memory)
    ids = encode(tokenizer, prompt) if isinstance(prompt, str) else prompt
    return continued(model, tokenizer, ids, sampling, route_of(model, ids))


def route_of(model: "PreTrainedModel", ids: Sequence[int], asked: str | None = None) -> RoutedPrompt | None:
    """The variant of a mixture that continues a prompt; None for a model that is of none.

    Args:
        model: any model.
        ids: tokens of the prompt.
        asked: name of a variant; None leaves the choice to the router.

    Raises:
        MoqaError: if there is no variant of that name, or the prompt is empty.
    """
    mixture: Mixture | None = getattr(model, "mixture", None)
    if mixture is not None:
        if asked is not None:
            check_known("variant", asked, mixture.names)
        return mixture.choose(ids) if asked is None else RoutedPrompt(asked)
    if asked is not None:
        raise MoqaError(f"--variant {asked} is of mixtures", "this model is of none")
    return None


def continued(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    ids: Sequence[int],
    sampling: Sampling | None,
    route: RoutedPrompt | None,
) -> Iterator[Piece]:
    """Continue a text with the variant of a route; with the model itself if that is None."""
    if route is None:
        return with_model(model, tokenizer, ids, sampling)
    mixture: Any = model.mixture
    found: Iterator[Piece] = mixture.steps(route.variant, lambda one: with_model(one, tokenizer, ids, sampling))
    return found
