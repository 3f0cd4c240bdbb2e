"""`moqa.qat.prepare`: let a model compute with the numbers that will be stored, while it is trained."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from moqa.errors import MoqaError
from moqa.format.scheme import Scheme
from moqa.kernels import PackedMatrix, ProductKernels, find_kernels
from moqa.models.adapt import adapt
from moqa.models.experts import (
    IMPLEMENTATION,
    PROJECTIONS,
    Experts,
    check_supported,
    is_experts,
    parameter_of,
    register_experts,
)
from moqa.models.layout import is_convolution
from moqa.qat.inputs import KERNEL_BITS, Inputs
from moqa.qat.stacks import DOWN, GATE_UP, RoundedInputs, RoundingExperts, RoundingWeights, StackGrid, owner_of
from moqa.qat.weights import WeightGrid
from moqa.runtime.packed import PackedExperts, packed_like

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (nn.Linear, nn.Embedding, *_CONVOLUTIONS)


@dataclass(frozen=True)
class _Part:
    """A matrix that is trained on its grid.

    Attributes:
        layer: that multiplies with it.
        owner: module whose parameter it is, alone or with others.
        parameter: name of the parameter in its owner.
        grid: of the matrix.
        matrix: [out, in] of the parameter's values.
        expert: index and projection; None for a layer with one matrix.
    """

    layer: nn.Module
    owner: nn.Module
    parameter: str
    grid: WeightGrid
    matrix: Callable[[Tensor], Tensor]
    expert: tuple[int, str] | None = None

    @property
    def exact(self) -> Tensor:
        """[out, in] as the optimizer has it."""
        return self.matrix(cast(Any, self.owner).parametrizations[self.parameter].original)


@dataclass(frozen=True)
class FakeQuantized:
    """A model that computes with rounded weights, and maybe inputs and a cache, until `remove` or `pack`.

    Attributes:
        model: the model; its parameters are trained as before.
        inputs: how inputs are rounded; None leaves them.
    """

    model: nn.Module
    inputs: Inputs | None
    _parts: dict[str, _Part]
    _cache_bits: int | None = None
    _hooks: list[RemovableHandle] = field(default_factory=list)

    def schemes(self) -> dict[str, Scheme]:
        """Scheme of every weight, by its name in the model."""
        return {name: part.grid.scheme for name, part in self._parts.items()}

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the matrix that every weight is stored as."""
        return {name: (part.exact.shape[0], part.exact.shape[1]) for name, part in self._parts.items()}

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
        for owner, parameter in self._parameters():
            parametrize.remove_parametrizations(owner, parameter, leave_parametrized=stored)
        for part in self._parts.values():
            for name in ("moqa_inputs", "moqa_weights_of"):
                if hasattr(part.layer, name):
                    delattr(part.layer, name)
        return self.model

    def pack(self, kernels: str = "auto") -> nn.Module:
        """The model with packed linear layers, convolutions and experts, which compute without the original weights.

        Inputs of 8 bits with ranges of their own are rounded by the kernels (`reference` does not), others as before.
        A rounded cache is what `moqa.generation` gives the model from now on.

        Args:
            kernels: that multiply, as for `moqa.load`.

        Raises:
            MoqaError: if a weight belongs to another kind of layer.
        """
        for name, part in self._parts.items():
            if part.expert is None and not (isinstance(part.layer, nn.Linear) or is_convolution(part.layer)):
                kind = type(part.layer).__name__.removeprefix("Parametrized")
                raise MoqaError(f"{name} belongs to {kind}, which cannot be packed", "leave it out with keep=")
        self._unhook()
        found = find_kernels(kernels)
        matrices = {
            name: PackedMatrix(part.grid.scheme, self.shapes()[name], part.grid.stored(part.exact))
            for name, part in self._parts.items()
        }
        for owner, parameter in self._parameters():
            parametrize.remove_parametrizations(owner, parameter, leave_parametrized=True)
        stacks = dict[nn.Module, dict[tuple[int, str], PackedMatrix]]()
        for name, part in self._parts.items():
            if part.expert is None:
                self._pack_layer(name.rpartition(".")[0], part.layer, matrices[name], found)
            else:
                stacks.setdefault(part.layer, {})[part.expert] = matrices[name]
        for experts, stacked in stacks.items():
            self._pack_experts(experts, stacked, found)
        for part in self._parts.values():
            if part.expert is not None and hasattr(part.owner, part.parameter):
                delattr(part.owner, part.parameter)
        if self._cache_bits is not None:
            from moqa.runtime.growing import round_cache

            round_cache(cast(Any, self.model), self._cache_bits)
        return self.model

    def _pack_layer(self, path: str, layer: nn.Module, matrix: PackedMatrix, kernels: ProductKernels) -> None:
        packed: nn.Module = packed_like(layer, matrix, kernels)
        if self._rounds_first:
            packed = nn.Sequential(cast(Any, layer).moqa_inputs, packed)
        owner, _, child = path.rpartition(".")
        setattr(self.model.get_submodule(owner), child, packed)

    def _pack_experts(
        self, experts: Experts, matrices: Mapping[tuple[int, str], PackedMatrix], kernels: ProductKernels
    ) -> None:
        if self._rounds_first:
            experts.moqa_weights = RoundingExperts(experts, matrices, kernels, experts.moqa_inputs)
        else:
            experts.moqa_weights = PackedExperts(experts, matrices, kernels)

    @property
    def _rounds_first(self) -> bool:
        """Whether inputs are not rounded as kernels round them."""
        return self.inputs is not None and (self.inputs.trained or self.inputs.bits < KERNEL_BITS)

    def _parameters(self) -> Iterable[tuple[nn.Module, str]]:
        """What has a parametrization."""
        return dict.fromkeys((part.owner, part.parameter) for part in self._parts.values())

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()


def prepare(
    model: nn.Module,
    scheme: Scheme | Mapping[str, Scheme],
    *,
    inputs: Inputs | None = None,
    cache_bits: int | None = None,
    keep: Collection[str] = (),
) -> FakeQuantized:
    """Let a model compute with rounded weights and inputs, and train it with any loop.

    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> trained = prepare(model, Scheme(width=3), keep=["2"])
    >>> model(torch.ones(1, 64)).sum().backward()
    >>> trained.bytes
    864

    Weights are those of linear layers, convolutions, embeddings and experts. In every forward pass they have the values
    that `stored` would hold, bit for bit; gradients pass through the rounding, and train scales and zero-points, too.
    Call it before the optimizer is made: the model has more parameters then.

    Args:
        model: any torch module.
        scheme: of integers, for all weights or by name of the weight; those that are not named stay as they are. A
            matrix of an expert has the name of its unit and `.weight`: `model.layers.0.mlp.experts.3.up_proj.weight`.
        inputs: how the inputs of these layers are rounded; None leaves them. Those of embeddings are never rounded.
        cache_bits: 8: keys and values of a language model are rounded as its cache rounds them (`--kv-bits`); None
            leaves them.
        keep: patterns of module names, such as `classifier` or `*.embed_tokens`, that stay as they are.

    Raises:
        MoqaError: if a module has weights of a kind that cannot be rounded, two share one, no weight is found, some
            experts of a layer have no scheme, or the model's cache cannot be rounded.
    """
    adapt(model)
    places = list(_places(model, keep, all_of=isinstance(scheme, Scheme)))
    chosen, seen = dict[str, Scheme](), dict[tuple[int, int | None, str], str]()
    for name, place in places:
        wanted = scheme if isinstance(scheme, Scheme) else scheme.get(name)
        if wanted is None or wanted.is_unquantized:
            continue
        if wanted.is_coded:
            raise MoqaError(f"{name} cannot be trained as codes of {wanted.encoding}", "give a scheme of integers")
        other = seen.setdefault((id(place.weight), *(place.expert or (None, ""))), name)
        if other != name:
            raise MoqaError(f"{other} and {name} are one weight", "leave both out with keep=")
        chosen[name] = wanted
    unknown = [] if isinstance(scheme, Scheme) else sorted(scheme.keys() - dict(places).keys())
    if unknown or not chosen:
        what = f"{unknown[0]} is not a weight of the model" if unknown else "no weight is left to be rounded"
        raise MoqaError(what, "weights are those of linear layers, convolutions, embeddings and experts")
    found, hooks = dict[str, _Part](), list[RemovableHandle]()
    if cache_bits is not None:
        from moqa.qat.cache import rounded_cache  # late: only language models have a cache, and need transformers

        hooks += rounded_cache(cast(Any, model), cache_bits)
    stacks = dict[nn.Module, dict[str, tuple[int, str]]]()
    for name, place in places:
        if place.expert is not None:
            stacks.setdefault(place.layer, {})[name] = place.expert
        elif name in chosen:
            found[name] = _prepared(place, chosen[name])
            if inputs is not None and not isinstance(place.layer, nn.Embedding):
                size = None if isinstance(place.layer, _CONVOLUTIONS) else chosen[name].group_size
                cast(Any, place.layer).moqa_inputs = inputs.module(size)
                hooks.append(place.layer.register_forward_pre_hook(_rounded))
    for experts, names in stacks.items():
        without = [name for name in names if name not in chosen]
        if len(without) < len(names):
            if without:
                problem = f"{without[0]} is left as it is, and other experts of its layer are rounded"
                raise MoqaError(problem, "give a scheme to all of them, or to none")
            found |= _prepared_stack(experts, {name: (at, chosen[name]) for name, at in names.items()}, inputs)
    if stacks:
        register_experts()
        for part in model.modules():
            if hasattr(part, "set_experts_implementation"):
                cast(Any, part).set_experts_implementation(IMPLEMENTATION)
    return FakeQuantized(model, inputs, found, cache_bits, hooks)


@dataclass(frozen=True)
class _Roundable:
    """A matrix that can be rounded."""

    layer: nn.Module
    weight: nn.Parameter
    expert: tuple[int, str] | None = None


def _places(model: nn.Module, keep: Collection[str], all_of: bool) -> Iterator[tuple[str, _Roundable]]:
    """All matrices that can be rounded, by name.

    Raises:
        MoqaError: if a module has others, and `all_of` them are wanted.
    """
    stacked = {id(getattr(part, name)) for part in model.modules() if is_experts(part) for name in (GATE_UP, DOWN)}
    for path, module in model.named_modules():
        if any(fnmatch(path, pattern) for pattern in keep):
            continue
        before = f"{path}." if path else ""
        if is_experts(module):
            check_supported(path, module)
            for expert in range(cast(int, module.num_experts)):
                for projection in PROJECTIONS:
                    weight = getattr(module, parameter_of(projection))
                    yield f"{before}{expert}.{projection}.weight", _Roundable(module, weight, (expert, projection))
        elif isinstance(module, _LAYERS):
            yield f"{before}weight", _Roundable(module, cast(Any, module).weight)
        elif all_of:
            own = module.named_parameters(recurse=False)
            others = [name for name, weight in own if weight.dim() > 1 and id(weight) not in stacked]
            if others:
                kind = f"{path or 'the model'} ({type(module).__name__})"
                raise MoqaError(f"{kind} has {others[0]}, which cannot be rounded", "leave it out with keep=")


def _prepared(place: _Roundable, scheme: Scheme) -> _Part:
    """Let a layer compute with a rounded weight."""
    rows = len(place.weight)
    grid = WeightGrid(place.weight, scheme, rows)
    parametrize.register_parametrization(place.layer, "weight", grid)
    return _Part(place.layer, place.layer, "weight", grid, lambda weight: weight.reshape(rows, -1))


def _prepared_stack(
    experts: Experts, schemes: Mapping[str, tuple[tuple[int, str], Scheme]], inputs: Inputs | None
) -> dict[str, _Part]:
    """Let all experts of a layer compute with rounded weights, and inputs."""
    by_place, found = dict(schemes.values()), dict[str, _Part]()
    names = {at: name for name, (at, _) in schemes.items()}
    for stacked in (GATE_UP, DOWN):
        owner, parameter = owner_of(experts, stacked)
        grid = StackGrid(experts, stacked, by_place)
        parametrize.register_parametrization(owner, parameter, grid)
        for at, (own, matrix) in grid.places().items():
            found[names[at]] = _Part(experts, owner, parameter, own, matrix, at)
    if inputs is not None:
        experts.moqa_inputs = RoundedInputs(inputs, by_place)
        experts.moqa_weights_of = RoundingWeights
    return found


def _rounded(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    rounding: nn.Module = module.moqa_inputs  # type: ignore[assignment]
    return (rounding(arguments[0]), *arguments[1:])
