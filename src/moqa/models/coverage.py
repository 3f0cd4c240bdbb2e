"""What in a decoder layer is a unit, what is kept on purpose, and the refusal of everything else."""

from collections.abc import Iterable
from typing import Any, TypeGuard

from torch import Tensor, nn

from moqa.errors import MoqaError
from moqa.models.experts import is_experts
from moqa.models.layout import is_convolution
from moqa.models.parts import LinearPart

# Gates with a handful of rows (a shared expert's gate, a per-head gate) are kept: they cost nothing and decide much.
SMALLEST_SIDE = 16


def is_matrix(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d | LinearPart]:
    """Whether a module multiplies with its weight and does nothing else; a subclass may, if it computes the same."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain or isinstance(module, LinearPart) or is_convolution(module)


def router_paths(model: nn.Module, layers: Iterable[nn.Module]) -> list[str]:
    """Paths in decoder layers of their routers: the modules whose outputs transformers records as router logits.

    >>> router_paths(model, model.model.layers)
    ['mlp.gate']

    One that is not recorded (its experts come from a table) stands where those of other layers do.
    """
    records: list[Any] = [getattr(module, "_can_record_outputs", None) or {} for module in model.modules()]
    recorders = [record["router_logits"] for record in records if "router_logits" in record]
    classes = tuple({kind for recorder in recorders for kind in _recorded_classes(recorder)})
    named = [(path, module) for layer in layers if has_experts(layer) for path, module in layer.named_modules()]
    # some families record the logits at a block that holds the experts, too: that is no router
    return sorted({path for path, module in named if issubclass(type(module), classes) and not _holds_units(module)})


def has_experts(module: nn.Module) -> bool:
    """Whether a module holds a stack of routed experts."""
    return any(map(is_experts, module.modules()))


def kept_paths(model: nn.Module, layer: nn.Module) -> list[str]:
    """Paths in a layer of what is kept beside routers: indexers of sparse attention, and what stays in float32.

    >>> "self_attn.compressor.indexer" in kept_paths(model, model.model.layers[1])
    True

    An indexer chooses what a token attends to, as a router chooses experts: no gradient tells what its bits are worth.
    What must be float32, whatever the model's dtype is, the family itself says.
    """
    wanted = [f".{name}." for name in getattr(model, "_keep_in_fp32_modules_strict", None) or ()]
    indexers = [path for path, module in layer.named_modules() if type(module).__name__.endswith("Indexer")]
    names = [name for name, _ in (*layer.named_modules(), *layer.named_parameters())]
    return indexers + [name for name in names if any(f".{name}.".endswith(end) for end in wanted)]


def within(path: str, roots: list[str]) -> bool:
    """Whether a path is one of the roots or below one."""
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def check_nothing_skipped(root: str, layer: nn.Module, covered: set[str], kept: list[str]) -> None:
    """Refuse a decoder layer with a matrix that is neither in a unit nor kept on purpose.

    Kept on purpose are vectors, routers, biases of experts, what a family keeps in float32, and what has fewer than
    two sides above SMALLEST_SIDE: gates, the kernels of depthwise convolutions, the states of state-space layers.

    Args:
        root: path of the layer.
        layer: the layer.
        covered: parameters that units cover, relative to the layer.
        kept: paths of its routers and of what else is kept, relative to the layer.

    Raises:
        MoqaError: naming the first such parameter, and the kinds of modules that hold one.
    """
    skipped: dict[str, tuple[str, Tensor]] = {}
    for path, module in layer.named_modules():
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            bias = is_experts(module) and parameter.dim() == 2
            if not bias and not within(name, kept) and name not in covered and _holds_matrix(module, parameter):
                skipped[name] = type(module).__name__, parameter
    if skipped:
        name, (kind, parameter) = next(iter(skipped.items()))
        kinds = sorted({kind for kind, _ in skipped.values()})
        raise MoqaError(
            f"{root}.{name} ({kind}, {list(parameter.shape)}) holds weights that moqa cannot quantize",
            "units are nn.Linear, nn.Conv2d without groups, and experts behind transformers' experts interface; "
            f"looked at {', '.join(kinds)}",
        )


def _holds_matrix(module: nn.Module, parameter: Tensor) -> bool:
    smallest = SMALLEST_SIDE if isinstance(module, nn.Linear) else SMALLEST_SIDE + 1
    return sum(side >= smallest for side in parameter.shape) >= 2


def _holds_units(module: nn.Module) -> bool:
    return has_experts(module) or any(isinstance(inner, LinearPart) for inner in module.modules())


def _recorded_classes(recorder: Any) -> list[type]:
    several = recorder if isinstance(recorder, (list, tuple)) else [recorder]
    classes = [getattr(found, "target_class", found) for found in several]
    return [found for found in classes if isinstance(found, type) and issubclass(found, nn.Module)]
