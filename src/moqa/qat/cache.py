"""Keys and values that are rounded in training as the cache of a packed model rounds them."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, DynamicCache

from moqa.qat.straight import through
from moqa.runtime.growing import check_cache, from_bytes, to_bytes
from moqa.tasks import task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RoundingCache:
    """A cache of exact states that gets rounded ones; gradients pass through the rounding.

    >>> states = torch.randn(1, 2, 3, 16)
    >>> keys, _ = RoundingCache(DynamicCache()).update(states, states, 0)
    >>> torch.equal(keys, from_bytes(to_bytes(states)))
    True

    Args:
        exact: keeps the states.
    """

    def __init__(self, exact: Cache) -> None:
        self._exact = exact

    def update(self, keys: Tensor, values: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, with new ones rounded to 8 bits."""
        new = (
            through(states, from_bytes(to_bytes(states.detach())).to(states.dtype)) for states in (keys, values)
        )  # fmt: skip
        found: tuple[Tensor, Tensor] = self._exact.update(*new, *arguments, **options)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._exact, name)


def rounded_cache(model: "PreTrainedModel", kv_bits: int) -> list[RemovableHandle]:
    """Let the blocks of a language model attend to rounded keys and values.

    >>> hooks = rounded_cache(view.model, 8)
    >>> for hook in hooks:
    ...     hook.remove()

    Args:
        model: whose layers all use full attention.
        kv_bits: 8.

    Returns:
        Hooks that do so until they are removed.

    Raises:
        MoqaError: see `moqa.runtime.growing.check_cache`.
    """
    check_cache(model, kv_bits)
    blocks = (model.get_submodule(path) for path in task_of(model.config).blocks(model))
    return [block.register_forward_pre_hook(_with_rounding, with_kwargs=True) for block in blocks]


def _with_rounding(
    block: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]  # noqa: ARG001
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    given = options.get("past_key_values")
    # without a cache, what was computed for a whole text is rounded all the same
    return arguments, options | {"past_key_values": RoundingCache(DynamicCache() if given is None else given)}
