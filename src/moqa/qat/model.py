"""`moqa.qat.prepare`: let a model compute with the numbers that will be stored, while it is trained."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from moqa.errors import MoqaError
from moqa.format.scheme import Scheme
from moqa.kernels import PackedMatrix, find_kernels
from moqa.models.experts import is_experts
from moqa.models.layout import is_convolution
from moqa.qat.inputs import Inputs
from moqa.qat.weights import WeightGrid
from moqa.runtime.packed import packed_like

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (nn.Linear, nn.Embedding, *_CONVOLUTIONS)


@dataclass(frozen=True)
class _Part:
    """A weight that is trained on its grid."""

    module: nn.Module
    parameter: str
    rows: int

    @property
    def grid(self) -> WeightGrid:
        return cast(Any, self.module).parametrizations[self.parameter][0]

    @property
    def exact(self) -> nn.Parameter:
        """As the optimizer has it."""
        return cast(Any, self.module).parametrizations[self.parameter].original


@dataclass(frozen=True)
class FakeQuantized:
    """A model that computes with rounded weights, and maybe inputs, until `remove` or `pack`.

    Attributes:
        model: the model; its parameters are trained as before.
        inputs: how inputs are rounded; None leaves them.
    """

    model: nn.Module
    inputs: Inputs | None
    _parts: dict[str, _Part]
    _hooks: list[RemovableHandle] = field(default_factory=list)

    def schemes(self) -> dict[str, Scheme]:
        """Scheme of every weight, by its name in the model."""
        return {name: part.grid.scheme for name, part in self._parts.items()}

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the matrix that every weight is stored as."""
        return {name: (part.rows, part.exact.numel() // part.rows) for name, part in self._parts.items()}

    def stored(self) -> dict[str, Tensor]:
        """Tensors of all weights as files have them: name of the weight, a dot, and the suffix of `Scheme.tensors`."""
        return {
            f"{name}.{suffix}": tensor
            for name, part in self._parts.items()
            for suffix, tensor in part.grid.stored(part.exact).items()
        }

    @property
    def bytes(self) -> int:
        """Of what `stored` returns."""
        return sum(scheme.stored_bytes(self.shapes()[name]) for name, scheme in self.schemes().items())

    def remove(self, stored: bool = True) -> nn.Module:
        """The model as an ordinary one, in full precision.

        Args:
            stored: with the weights as they were stored last; else as the optimizer had them, for further training.
        """
        self._unhook()
        for part in self._parts.values():
            parametrize.remove_parametrizations(part.module, part.parameter, leave_parametrized=stored)
            if hasattr(part.module, "moqa_inputs"):
                del part.module.moqa_inputs
        return self.model

    def pack(self, kernels: str = "auto") -> nn.Module:
        """The model with packed linear layers and convolutions, which compute without the original weights.

        Inputs with a trained range are rounded as before; others are rounded by the kernels.

        Args:
            kernels: that multiply, as for `moqa.load`.

        Raises:
            MoqaError: if a weight belongs to another kind of layer.
        """
        for name, part in self._parts.items():
            if not (isinstance(part.module, nn.Linear) or is_convolution(part.module)):
                kind = type(part.module).__name__.removeprefix("Parametrized")
                raise MoqaError(f"{name} belongs to {kind}, which cannot be packed", "leave it out with keep=")
        self._unhook()
        found, shapes = find_kernels(kernels), self.shapes()
        for name, part in self._parts.items():
            matrix = PackedMatrix(part.grid.scheme, shapes[name], part.grid.stored(part.exact))
            parametrize.remove_parametrizations(part.module, part.parameter, leave_parametrized=True)
            path = name.rpartition(".")[0]
            packed: nn.Module = packed_like(part.module, matrix, found)
            rounding = getattr(part.module, "moqa_inputs", None)
            if self.inputs is not None and self.inputs.trained and rounding is not None:
                packed = nn.Sequential(rounding, packed)
            owner, _, child = path.rpartition(".")
            setattr(self.model.get_submodule(owner), child, packed)
        return self.model

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()


def prepare(
    model: nn.Module,
    scheme: Scheme | Mapping[str, Scheme],
    *,
    inputs: Inputs | None = None,
    keep: Collection[str] = (),
) -> FakeQuantized:
    """Let a model compute with rounded weights and inputs, and train it with any loop.

    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> trained = prepare(model, Scheme(width=3), keep=["2"])
    >>> model(torch.ones(1, 64)).sum().backward()
    >>> trained.bytes
    864

    Weights are those of linear layers, convolutions, embeddings and stacks of experts. In every forward pass they have
    the values that `stored` would hold, bit for bit; gradients pass through the rounding, and train scales and
    zero-points, too. Call it before the optimizer is made: the model has more parameters then.

    Args:
        model: any torch module.
        scheme: of integers, for all weights or by name of the weight; those that are not named stay as they are.
        inputs: how the inputs of these layers are rounded; None leaves them. Those of embeddings are never rounded.
        keep: patterns of module names, such as `classifier` or `*.embed_tokens`, that stay as they are.

    Raises:
        MoqaError: if a module has weights of a kind that cannot be rounded, two share one, or no weight is found.
    """
    found, seen = dict[str, _Part](), dict[int, str]()
    for name, part in _weights(model, keep):
        chosen = scheme if isinstance(scheme, Scheme) else scheme.get(name)
        if chosen is None or chosen.is_unquantized:
            continue
        if chosen.is_coded:
            raise MoqaError(f"{name} cannot be trained as codes of {chosen.encoding}", "give a scheme of integers")
        weight = getattr(part.module, part.parameter)
        other = seen.setdefault(id(weight), name)
        if other != name:
            raise MoqaError(f"{other} and {name} are one weight", "leave both out with keep=")
        found[name] = part
    unknown = [] if isinstance(scheme, Scheme) else sorted(scheme.keys() - dict(_weights(model, keep)).keys())
    if unknown or not found:
        what = f"{unknown[0]} is not a weight of the model" if unknown else "no weight is left to be rounded"
        raise MoqaError(what, "weights are those of linear layers, convolutions, embeddings and experts")
    hooks = list[RemovableHandle]()
    for name, part in found.items():
        chosen = scheme if isinstance(scheme, Scheme) else scheme[name]
        grid = WeightGrid(getattr(part.module, part.parameter), chosen, part.rows)
        parametrize.register_parametrization(part.module, part.parameter, grid)
        if inputs is not None and not isinstance(part.module, nn.Embedding) and not is_experts(part.module):
            part.module.moqa_inputs = inputs.module(
                None if isinstance(part.module, _CONVOLUTIONS) else chosen.group_size
            )
            hooks.append(part.module.register_forward_pre_hook(_rounded))
    return FakeQuantized(model, inputs, found, hooks)


def _weights(model: nn.Module, keep: Collection[str]) -> Iterator[tuple[str, _Part]]:
    """All weights that can be rounded, by name.

    Raises:
        MoqaError: if a module has others.
    """
    for path, module in model.named_modules():
        if any(fnmatch(path, pattern) for pattern in keep):
            continue
        before = f"{path}." if path else ""
        if is_experts(module):
            for parameter in ("gate_up_proj", "down_proj"):
                stack = getattr(module, parameter)
                yield f"{before}{parameter}", _Part(module, parameter, stack.shape[0] * stack.shape[1])
        elif isinstance(module, _LAYERS):
            yield f"{before}weight", _Part(module, "weight", len(module.weight))
        else:
            others = [name for name, weight in module.named_parameters(recurse=False) if weight.dim() > 1]
            if others:
                kind = f"{path or 'the model'} ({type(module).__name__})"
                raise MoqaError(f"{kind} has {others[0]}, which cannot be rounded", "leave it out with keep=")


def _rounded(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    rounding: nn.Module = module.moqa_inputs  # type: ignore[assignment]
    return (rounding(arguments[0]), *arguments[1:])
