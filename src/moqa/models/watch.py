"""Watch the units of one block while it runs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor

from moqa.models.experts import ExpertsObserver, observed
from moqa.models.units import Unit
from moqa.models.view import ModelView

# called with a unit that is not an expert, its [..., in] input and its [..., out] output
LinearObserver = Callable[[Unit, Tensor, Tensor], None]


@contextmanager
def watching(
    view: ModelView, layer: int, experts: ExpertsObserver | None, linear: LinearObserver | None = None
) -> Iterator[None]:
    """Within `with`, call observers for everything that the units of a block compute.

    >>> hidden = stages.embed(tokens)
    >>> with watching(view, 3, None, lambda unit, x, out: print(unit.projection, list(x.shape), list(out.shape))):
    ...     hidden = stages.run_block(3, hidden)
    q_proj [2, 16, 256] [2, 16, 256]
    k_proj [2, 16, 256] [2, 16, 128]
    v_proj [2, 16, 256] [2, 16, 128]
    o_proj [2, 16, 256] [2, 16, 256]

    Args:
        view: the model.
        layer: index of the block.
        experts: sees the routed experts, in blocks that have them.
        linear: sees every other unit.
    """
    with ExitStack() as stack:
        path = view.experts_path(layer)
        if experts is not None and path is not None:
            stack.enter_context(observed(view.module(path), experts))
        if linear is not None:
            for unit in view.block_units(layer):
                if unit.role != "expert":
                    hook = view.module(unit.module).register_forward_hook(partial(_see, linear, unit))
                    stack.callback(hook.remove)
        yield


def _see(observer: LinearObserver, unit: Unit, _: object, args: tuple[Tensor, ...], out: Tensor) -> None:
    observer(unit, args[0], out)
