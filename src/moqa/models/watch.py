"""Watch the units of one decoder layer while it runs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor

from moqa.models.experts import ExpertsObserver, observed
from moqa.models.units import Unit
from moqa.models.view import ModelView

# called with a unit that is no expert, its [..., in] input and its [..., out] output
LinearObserver = Callable[[Unit, Tensor, Tensor], None]


@contextmanager
def watching(
    view: ModelView, layer: int, experts: ExpertsObserver | None, linear: LinearObserver | None = None
) -> Iterator[None]:
    """Call observers for everything that a layer's units compute in a block.

    >>> with watching(view, 3, statistics):
    ...     stages.run_block(3, hidden)

    Args:
        view: the model.
        layer: index of the decoder layer.
        experts: sees the routed experts, in layers that have them.
        linear: sees every other unit.
    """
    with ExitStack() as stack:
        path = view.experts_path(layer)
        if experts is not None and path is not None:
            stack.enter_context(observed(view.module(path), experts))
        if linear is not None:
            for unit in view.block_units(layer):
                if unit.role != "expert":
                    hook = view.module(unit.module).register_forward_hook(_telling(linear, unit))
                    stack.callback(hook.remove)
        yield


def _telling(observer: LinearObserver, unit: Unit) -> Callable[[object, tuple[Tensor, ...], Tensor], None]:
    def see(_: object, args: tuple[Tensor, ...], out: Tensor) -> None:
        observer(unit, args[0], out)

    return see
