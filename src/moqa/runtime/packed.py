"""Packed modules: they replace the modules of a model whose matrices are packed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from moqa.errors import MoqaError
from moqa.format.scheme import Scheme
from moqa.format.tiles import KEEP_WIDTH
from moqa.kernels import ACTIVATIONS, ExpertStack, PackedMatrix, ProductKernels
from moqa.kernels.patch import patched_down
from moqa.kernels.reference import activate
from moqa.models.experts import Experts, projection_rows, weights_from
from moqa.models.layout import Convolution, layout_of
from moqa.models.view import ModelView
from moqa.runtime.variants import ExpertsVariant, Variants


class _PackedProduct(torch.autograd.Function):
    """A product with a packed matrix, which stays as it is: the input and the bias have gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrix: PackedMatrix, kernels: ProductKernels, bias: Tensor | None
    ) -> Tensor:  # fmt: skip
        # its tensors, not itself: a graph may outlive the interpreter's modules, with native objects of the matrix
        ctx.scheme, ctx.shape = matrix.scheme, matrix.shape
        ctx.save_for_backward(*matrix.buffers())
        return kernels.linear(matrix, x.detach(), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        of_bias = gradients[0].flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
        tensors = dict(zip(ctx.scheme.tensors(ctx.shape), ctx.saved_tensors, strict=True))
        weight = PackedMatrix(ctx.scheme, ctx.shape, tensors).dense()
        return gradients[0] @ weight.to(gradients[0].dtype), None, None, of_bias


def packed_product(kernels: ProductKernels, matrix: PackedMatrix, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., in] -> [..., out], with a gradient where one is asked for."""
    # weights that are trained are held for reference kernels, which are torch's own operations
    if (
        torch.is_grad_enabled()
        and not matrix.is_trained
        and (x.requires_grad or (bias is not None and bias.requires_grad))
    ):
        return cast(Tensor, _PackedProduct.apply(x, matrix, kernels, bias))
    return kernels.linear(matrix, x, bias)


class _Copy(Tensor):
    """Weights that are only read: to merge a LoRA, PEFT writes to their `data`, which nothing would ever see."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Any:  # type: ignore[override]
        """Refused."""
        raise MoqaError("a LoRA cannot be merged into packed weights", "save it, and give its folder to --lora")


class PackedLinear(nn.Linear):
    """A linear layer whose weight is packed. PEFT adapts it as any other, but can't merge anything into it.

    >>> from moqa.kernels import find_kernels
    >>> PackedLinear(matrix, None, find_kernels())(torch.randn(3, 256)).shape
    torch.Size([3, 256])

    Args:
        matrix: the weight.
        bias: [out] or None.
        kernels: that multiply.
    """

    def __init__(self, matrix: PackedMatrix, bias: Tensor | None, kernels: ProductKernels) -> None:
        nn.Module.__init__(self)
        self.matrix, self.kernels = matrix, kernels
        self.out_features, self.in_features = matrix.shape
        self.bias: Any = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def of_kept(cls, weight: Tensor, bias: Tensor | None, kernels: ProductKernels) -> "PackedLinear":
        """A layer with an unquantized [out, in] bfloat16 weight, for inputs of any dtype."""
        matrix = PackedMatrix(Scheme(width=KEEP_WIDTH), (weight.shape[0], weight.shape[1]), {"weight": weight})
        return cls(matrix, bias, kernels)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return packed_product(self.kernels, self.matrix, x, self.bias)

    @property
    def weight(self) -> Tensor:
        """[out, in] a copy of the weights, whose device, dtype and shape PEFT reads."""
        return self.matrix.dense().as_subclass(_Copy)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        """Transformers ties a head to the embedding again and again; they are tied as stored."""
        if value.data_ptr() != dict(self.matrix.named_buffers()).get("weight", torch.empty(0)).data_ptr():
            raise AttributeError("the weights of a packed layer cannot be replaced")


class PackedConvolution(PackedLinear):
    """A convolution whose weight is packed: a product with patches of its input.

    >>> from moqa.kernels import find_kernels
    >>> module = nn.Conv2d(8, 64, 3, padding=1)
    >>> matrix = PackedMatrix(Scheme(width=16), (64, 72), {"weight": module.weight.data.flatten(1).bfloat16()})
    >>> PackedConvolution(matrix, None, find_kernels(), Convolution.of(module))(torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 64, 5, 5])

    Args:
        matrix: the weight, [out, channels * kernel height * kernel width].
        bias: [out] or None.
        kernels: that multiply.
        convolution: defines the patches.
    """

    def __init__(
        self, matrix: PackedMatrix, bias: Tensor | None, kernels: ProductKernels, convolution: Convolution
    ) -> None:
        super().__init__(matrix, bias, kernels)
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, (height,) width] -> [batch, out, (height,) width]."""
        return self.convolution.outputs(super().forward(self.convolution.patches(x)), x)


def packed_like(module: nn.Module, matrix: PackedMatrix, kernels: ProductKernels) -> PackedLinear:
    """The packed module that replaces a module with one matrix."""
    bias: Any = module.bias
    convolution = layout_of(module)
    if convolution is None:
        return PackedLinear(matrix, bias, kernels)
    return PackedConvolution(matrix, bias, kernels, convolution)


def packed_parts(
    view: ModelView,
    layer: int,
    matrices: Mapping[str, PackedMatrix],
    kernels: ProductKernels,
    variants: Variants | None = None,
) -> Iterator[tuple[nn.Module, str, "PackedLinear | PackedExperts"]]:
    """The packed modules of a block, each with its owner and the name that it gets there.

    Args:
        view: the model; its own modules stay as they are.
        layer: index of the block.
        matrices: unit name -> matrix, of all units of the block.
        kernels: that multiply.
        variants: of the model, see `PackedExperts`.
    """
    stacks: dict[str, dict[tuple[int, str], PackedMatrix]] = {}
    for unit in view.block_units(layer):
        if unit.expert is not None:
            stacks.setdefault(unit.module, {})[unit.expert, unit.projection] = matrices[unit.name]
            continue
        parent, _, child = unit.module.rpartition(".")
        yield view.module(parent), child, packed_like(view.module(unit.module), matrices[unit.name], kernels)
    for path, stacked in stacks.items():
        experts: Experts = view.module(path)
        yield experts, "moqa_weights", PackedExperts(experts, stacked, kernels, variants=variants, layer=layer)


@contextmanager
def computing_with(
    view: ModelView, layer: int, matrices: Mapping[str, PackedMatrix], kernels: ProductKernels
) -> Iterator[None]:
    """Inside this context, a block of a model computes with packed units.

    Args:
        view: the model; the block's own weights are freed if they can be read again.
        layer: index of the block.
        matrices: unit name -> matrix, of all units of the block.
        kernels: that multiply.
    """
    with ExitStack() as stack:
        stack.enter_context(view.without(layer))
        for owner, name, packed in packed_parts(view, layer, matrices, kernels):
            if isinstance(packed, PackedExperts):
                stack.enter_context(weights_from(owner, packed))
            else:
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, packed)
        yield


class KeptEmbedding(nn.Module):
    """An embedding whose table stays in its stored dtype; rows are returned in the dtype of the model."""

    def __init__(self, weight: Tensor, padding_idx: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        # not a parameter: transformers takes a model's dtype from the first one
        self.register_buffer("weight", weight)
        self.padding_idx, self.dtype = padding_idx, dtype

    def forward(self, ids: Tensor) -> Tensor:
        """[...] int64 -> [..., features]."""
        return embedding(ids, self.get_buffer("weight"), self.padding_idx).to(self.dtype)


class _Expert(nn.ModuleDict):
    """The layers of one expert by projection; it notices when PEFT puts an adapted layer in the place of one."""

    def __init__(self, layers: Mapping[str, PackedLinear], variants: Variants, place: tuple[int, int]) -> None:
        super().__init__(layers)
        self._variants, self._place = variants, place

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            is_plain = all(type(layer) is PackedLinear for layer in self.values())
            change = self._variants.adapted.discard if is_plain else self._variants.adapted.add
            change(self._place)


class PackedExperts(nn.Module):
    """All routed experts of a layer, packed; they replace the stacked parameters (`ExpertWeights`).

    Args:
        experts: the module whose parameters are replaced.
        matrices: (expert, projection) -> matrix.
        kernels: that multiply.
        variants: of the model; None means that these matrices are never replaced.
        layer: index of the layer, which variants use.

    Attributes:
        count: number of experts.
    """

    def __init__(
        self,
        experts: Experts,
        matrices: Mapping[tuple[int, str], PackedMatrix],
        kernels: ProductKernels,
        *,
        variants: Variants | None = None,
        layer: int = 0,
    ) -> None:
        super().__init__()
        self._rows, self.count = projection_rows(experts), experts.num_experts
        self.activation = activation_of(experts)
        self.variants, self._layer = variants or Variants(), layer
        self._plain = ExpertsVariant()
        self._biases: tuple[Tensor, ...] = ()  # of the module that the stacks were made for
        self.counts: Tensor | None = None
        self.kernels = kernels
        layers: dict[int, dict[str, PackedLinear]] = {}
        for (expert, projection), matrix in matrices.items():
            layers.setdefault(expert, {})[projection] = PackedLinear(matrix, None, kernels)
        self.experts = nn.ModuleList(_Expert(layers[e], self.variants, (layer, e)) for e in range(self.count))

    def count_in(self, counts: Tensor | None) -> None:
        """From now on, count the tokens of each expert in [experts] int64 on the CPU; None counts nothing."""
        self.counts = counts
        self.variants.changed()

    @property
    def variant(self) -> ExpertsVariant:
        """What currently differs from the checkpoint."""
        return self.variants.of_layer(self._layer) or self._plain

    def run(self, module: Experts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor | None:
        """All experts in one call, or None where they are computed product by product.

        So are experts whose activation or patches the kernels cannot compute, adapted ones, and those with a gradient.
        """
        if self.counts is not None:
            # an index past the last expert stands for none
            self.counts += torch.bincount(index.flatten().cpu(), minlength=self.count)[: self.count]
        if self.variants.adapted and self.variant is not self._plain:
            self.variants.check_not_adapted()
        differentiable = torch.is_grad_enabled() and (hidden.requires_grad or self.matrix(0, "down_proj").is_trained)
        if differentiable or self.variants.adapted or self.activation is None:
            return None
        if self.variant.patches and not self.kernels.takes_patches:
            return None
        return self.kernels.experts(self.stack(module), hidden, index, weights)

    def stack(self, module: Experts) -> ExpertStack:
        """The matrices in the form that kernels take; only if `activation` is known."""
        biases = (module.gate_up_proj_bias, module.down_proj_bias) if module.has_bias else ()
        if len(biases) != len(self._biases) or any(a is not b for a, b in zip(biases, self._biases, strict=True)):
            self._forget_stacks()
            self._biases = biases
        variant = self.variant
        stack = variant.stack  # another thread may forget it
        if stack is None:
            assert self.activation is not None
            stack = variant.stack = self._as_stack(module, self.activation)
        return stack

    def gate_up(self, expert: int, x: Tensor) -> Tensor:
        """See `ExpertWeights`."""
        parts = {name: self._product(expert, name, x) for name in self._rows}
        for patch in self.variant.patches:
            for name, channels in (("gate_proj", patch.gate), ("up_proj", patch.up)):
                parts[name] = patch.join(channels, expert, x, parts[name], partial(packed_product, self.kernels))
        first = next(iter(parts.values()))
        stacked = first.new_empty(*first.shape[:-1], 2 * first.shape[-1])
        for name, rows in self._rows.items():
            stacked[..., rows] = parts[name]
        return stacked

    def down(self, expert: int, x: Tensor) -> Tensor:
        """See `ExpertWeights`."""
        base = partial(self._product, expert, "down_proj")
        return patched_down(self.variant.patches, expert, x, base, partial(packed_product, self.kernels))

    def matrix(self, expert: int, projection: str) -> PackedMatrix:
        """The matrix of the checkpoint."""
        layer = self._module(expert, projection)
        matrix: PackedMatrix = getattr(layer, "base_layer", layer).matrix
        return matrix

    def _product(self, expert: int, projection: str, x: Tensor) -> Tensor:
        replacement = self.variant.matrices.get((expert, projection))
        if replacement is not None:
            return packed_product(self.kernels, replacement, x)
        return cast(Tensor, self._module(expert, projection)(x))

    def _module(self, expert: int, projection: str) -> Any:
        return cast(_Expert, self.experts[expert])[projection]

    def _as_stack(self, module: Experts, activation: str) -> ExpertStack:
        def all_of(projection: str) -> list[PackedMatrix]:
            replaced = self.variant.matrices
            return [replaced.get((e, projection)) or self.matrix(e, projection) for e in range(self.count)]

        parts = (all_of("gate_proj"), all_of("up_proj"), all_of("down_proj"))
        stack = ExpertStack(*parts, activation, patches=self.variant.patches)
        if module.has_bias:
            both = module.gate_up_proj_bias.float()
            stack.gate_bias = both[:, self._rows["gate_proj"]].contiguous()
            stack.up_bias = both[:, self._rows["up_proj"]].contiguous()
            stack.down_bias = module.down_proj_bias.float().contiguous()
        return stack

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._forget_stacks()
        for variant in self.variants.all_of_layer(self._layer):
            for matrix in variant.parts():
                matrix._apply(fn)
        return super()._apply(fn, recurse)

    def _forget_stacks(self) -> None:
        for variant in (self._plain, *self.variants.all_of_layer(self._layer)):
            variant.stack = None


def activation_of(experts: Experts) -> str | None:
    """Which of the kernels' activations a family's experts compute, found by computing it; None if it is another.

    >>> activation_of(view.module("model.layers.0.mlp.experts"))
    'silu'
    """
    rows = projection_rows(experts, width=64)

    def compute(gate: Tensor, up: Tensor) -> Tensor:
        gate_up = torch.empty(1, 128, dtype=torch.float32)
        gate_up[:, rows["gate_proj"]], gate_up[:, rows["up_proj"]] = gate, up
        return experts._apply_gate(gate_up)[0]

    return _name_of(compute)


def activation_name(function: Callable[[Tensor], Tensor]) -> str | None:
    """Which of the kernels' activations `function(gate) * up` is; None if it is another.

    >>> activation_name(torch.nn.SiLU())
    'silu'
    """
    return _name_of(lambda gate, up: function(gate) * up)


def _name_of(compute: Callable[[Tensor, Tensor], Tensor]) -> str | None:
    with torch.device("cpu"):  # a model may be built on the meta device
        gate, up = (torch.linspace(*ends, 64, dtype=torch.float32) for ends in ((-12, 12), (9, -9)))
        wanted = compute(gate, up)
        return next((name for name in ACTIVATIONS if torch.allclose(activate(name, gate, up), wanted, atol=1e-5)), None)


@contextmanager
def unpacked(module: nn.Module) -> Iterator[None]:
    """Unpack every matrix below a module once, while the reference kernels use it many times."""
    users = [m for m in module.modules() if isinstance(m, PackedLinear | PackedExperts)]
    slow = [user for user in users if user.kernels.name == "reference"]
    matrices = [m for user in slow for m in user.modules() if isinstance(m, PackedMatrix)]
    matrices += [m for user in slow if isinstance(user, PackedExperts) for m in user.variant.parts()]
    for matrix in matrices:
        matrix.hold()
    try:
        yield
    finally:
        for matrix in matrices:
            matrix.release()
