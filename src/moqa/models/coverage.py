"""What in a decoder layer is a unit, what is kept on purpose, and the refusal of everything else."""

from typing import Any, TypeGuard

from torch import Tensor, nn

from moqa.errors import MoqaError
from moqa.models.experts import is_experts

# Gates with a handful of rows (a shared expert's gate, a per-head gate) are kept: they cost nothing and decide much.
SMALLEST_SIDE = 16


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module multiplies with its weight and does nothing else; a subclass may, if it computes the same."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def router_paths(model: nn.Module, layer: nn.Module) -> list[str]:
    """Paths of a layer's routers: the modules whose outputs transformers records as router logits.

    >>> router_paths(model, model.model.layers[0])
    ['mlp.gate']
    """
    if not any(is_experts(module) for module in layer.modules()):
        return []
    records: list[Any] = [getattr(module, "_can_record_outputs", None) or {} for module in model.modules()]
    recorders = [record["router_logits"] for record in records if "router_logits" in record]
    classes = tuple({kind for recorder in recorders for kind in _recorded_classes(recorder)})
    named = [(path, module) for path, module in layer.named_modules() if issubclass(type(module), classes)]
    # some families record the logits at a block that holds the experts, too: that is no router
    return [path for path, module in named if not any(is_experts(inner) for inner in module.modules())]


def within(path: str, roots: list[str]) -> bool:
    """Whether a path is one of the roots or below one."""
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def check_nothing_skipped(root: str, layer: nn.Module, covered: set[str], routers: list[str]) -> None:
    """Refuse a decoder layer with a matrix that is neither in a unit nor kept on purpose.

    Kept on purpose are vectors, routers, biases of experts, and what has fewer than two sides above
    SMALLEST_SIDE: gates, the kernels of depthwise convolutions, the states of state-space layers.

    Args:
        root: path of the layer.
        layer: the layer.
        covered: parameters that units cover, relative to the layer.
        routers: paths of its routers, relative to the layer.

    Raises:
        MoqaError: naming the first such parameter, and the kinds of modules that hold one.
    """
    skipped: dict[str, tuple[str, Tensor]] = {}
    for path, module in layer.named_modules():
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            bias = is_experts(module) and parameter.dim() == 2
            if not bias and not within(path, routers) and name not in covered and _is_matrix(module, parameter):
                skipped[name] = type(module).__name__, parameter
    if skipped:
        name, (kind, parameter) = next(iter(skipped.items()))
        kinds = sorted({kind for kind, _ in skipped.values()})
        raise MoqaError(
            f"{root}.{name} ({kind}, {list(parameter.shape)}) holds weights that moqa cannot quantize",
            f"units are nn.Linear and experts behind transformers' experts interface; looked at {', '.join(kinds)}",
        )


def _is_matrix(module: nn.Module, parameter: Tensor) -> bool:
    smallest = SMALLEST_SIDE if isinstance(module, nn.Linear) else SMALLEST_SIDE + 1
    return sum(side >= smallest for side in parameter.shape) >= 2


def _recorded_classes(recorder: Any) -> list[type]:
    several = recorder if isinstance(recorder, (list, tuple)) else [recorder]
    classes = [getattr(found, "target_class", found) for found in several]
    return [found for found in classes if isinstance(found, type) and issubclass(found, nn.Module)]
