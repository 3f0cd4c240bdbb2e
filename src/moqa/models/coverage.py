"""Which matrices of a block are units, which are kept on purpose, and the check that there are no others."""

from collections.abc import Iterable
from typing import Any, TypeGuard

from torch import Tensor, nn

from moqa.errors import MoqaError
from moqa.models.experts import is_experts
from moqa.models.layout import is_convolution
from moqa.models.parts import LinearPart

# Gates with a handful of rows (a shared expert's gate, a per-head gate) are kept: they are tiny and matter a lot.
SMALLEST_SIDE = 16


def is_matrix(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv1d | nn.Conv2d | LinearPart]:
    """Whether a module only multiplies with its weight; also true of subclasses with an unchanged forward."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain or isinstance(module, LinearPart) or is_convolution(module)


def router_paths(model: nn.Module, layers: Iterable[nn.Module]) -> list[str]:
    """Paths, relative to a block, of the routers: the modules whose outputs transformers records as router logits.

    >>> router_paths(view.model, view.blocks)
    ['mlp.gate']

    A router that is not recorded (its experts come from a table) has the same path as those of other blocks.
    """
    records: list[Any] = [getattr(module, "_can_record_outputs", None) or {} for module in model.modules()]
    recorders = [record["router_logits"] for record in records if "router_logits" in record]
    classes = tuple({kind for recorder in recorders for kind in _recorded_classes(recorder)})
    named = [(path, module) for layer in layers if has_experts(layer) for path, module in layer.named_modules()]
    # some families record the logits at a module that also holds the experts: that is not a router
    return sorted({path for path, module in named if issubclass(type(module), classes) and not _holds_units(module)})


def has_experts(module: nn.Module) -> bool:
    """Whether a module holds a stack of routed experts."""
    return any(map(is_experts, module.modules()))


def kept_paths(model: nn.Module, layer: nn.Module) -> list[str]:
    """Paths in a block of what is kept besides routers: indexers of sparse attention, and what stays in float32.

    >>> kept_paths(view.model, view.blocks[1])
    []

    An indexer chooses what a token attends to, as a router chooses experts: no gradient shows what its bits are worth.
    Each family declares which of its parameters must be float32, whatever the model's dtype is.
    """
    wanted = [f".{name}." for name in getattr(model, "_keep_in_fp32_modules_strict", None) or ()]
    indexers = [path for path, module in layer.named_modules() if type(module).__name__.endswith("Indexer")]
    names = [name for name, _ in (*layer.named_modules(), *layer.named_parameters())]
    return indexers + [name for name in names if any(f".{name}.".endswith(end) for end in wanted)]


def within(path: str, roots: list[str]) -> bool:
    """Whether a path is one of the roots or below one."""
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def check_nothing_skipped(root: str, layer: nn.Module, covered: set[str], kept: list[str]) -> None:
    """Refuse a block with a matrix that is neither in a unit nor kept on purpose.

    Kept on purpose are vectors, routers, biases of experts, what a family keeps in float32, transposed convolutions,
    and what has fewer than two sides above SMALLEST_SIDE: gates, the kernels of depthwise convolutions, the states of
    state-space layers.

    Args:
        root: path of the block.
        layer: the block.
        covered: parameters that units cover, relative to the block.
        kept: paths of its routers and of what else is kept, relative to the block.

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
            "units are nn.Linear, convolutions without groups, and experts behind transformers' experts interface; "
            f"looked at {', '.join(kinds)}",
        )


def _holds_matrix(module: nn.Module, parameter: Tensor) -> bool:
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d):
        return False  # an output is a sum over places: it is no product with a row of one matrix
    smallest = SMALLEST_SIDE if isinstance(module, nn.Linear) else SMALLEST_SIDE + 1
    return sum(side >= smallest for side in parameter.shape) >= 2


def _holds_units(module: nn.Module) -> bool:
    return has_experts(module) or any(isinstance(inner, LinearPart) for inner in module.modules())


def _recorded_classes(recorder: Any) -> list[type]:
    entries = recorder if isinstance(recorder, (list, tuple)) else [recorder]
    classes = [getattr(entry, "target_class", entry) for entry in entries]
    return [kind for kind in classes if isinstance(kind, type) and issubclass(kind, nn.Module)]
