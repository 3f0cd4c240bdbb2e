"""Let the units of a block multiply in the precision in which they are stored."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from moqa.models.attributes import having
from moqa.models.layout import layout_of
from moqa.models.products import fast_dtype, product
from moqa.models.view import ModelView


@contextmanager
def in_stored_precision(view: "ModelView", layer: int) -> Iterator[None]:
    """Within `with`, units that are stored in bfloat16 multiply in bfloat16, if the processor supports that natively.

    >>> hidden = stages.embed(tokens)
    >>> with in_stored_precision(view, 3):
    ...     stages.run_block(3, hidden).dtype
    torch.float32

    Such a model is served that way, at several times the speed of float32. Everything between the units' products stays
    in float32.
    """
    with ExitStack() as stack:
        for unit in view.block_units(layer):
            module, dtype = view.module(unit.module), fast_dtype(view.stored_dtype(unit))
            # convolutions are fast in float32 too
            if dtype is None or "moqa_dtype" in vars(module) or layout_of(module) is not None:
                continue
            stack.enter_context(having(module, "moqa_dtype", dtype))
            if unit.expert is None:
                stack.enter_context(having(module, "forward", partial(_linear, module)))
        yield


def _linear(module: Any, x: Tensor) -> Tensor:
    out = product(x, module.weight.T, module.moqa_dtype)
    return out if module.bias is None else out + module.bias
