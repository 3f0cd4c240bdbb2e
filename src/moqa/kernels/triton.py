"""The Triton kernels (`triton_ops.py`) for CUDA GPUs: which of them is launched on which tensors.

Weights are read in place: a launch takes a table of their addresses, so that experts of any widths and group sizes
share it. Results equal those of the C++ kernels, and a row's result does not depend on the other rows of the batch.
"""

import importlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from moqa.format.tiles import BLOCK, KEEP_WIDTH, TILE
from moqa.kernels.matrix import PackedMatrix, Prepared
from moqa.kernels.registry import ExpertStack, check_encoding

# Up to this many rows are multiplied in registers, more by the tensor cores, which need 16. Not measured yet:
# benchmarks/gpu.py times both.
FEW_ROWS = 16
# Up to this many slots (pairs of token and expert) per expert, each slot is computed alone, which needs no sorting.
FEW_SLOTS = 2
# outputs of a work item for the tensor cores
_OUT = 64
# numbers of the forms in `triton_weights.py` that encodings of their own have
_FORMS = {"table": 2, "trellis": 3}


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@cache
def _ops() -> Any:
    return importlib.import_module("moqa.kernels.triton_ops")


@dataclass(frozen=True)
class _Packed:
    """Matrices of one shape that a launch chooses from.

    Attributes:
        table: [matrices, 8] int64: addresses of three planes (or the 16-bit weight), scales, and zero-points or
            factors; where its kind begins in `kinds`; where its group size begins in a row's q and in its steps
            (`_quantize`).
        kinds: compile-time constants, four numbers for each kind: width, group size, form, float16 scales.
        sizes: group sizes, each followed by the power of two that holds it; rows are quantized once for each.
        shape: (out, in).
    """

    table: Tensor
    kinds: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, int]

    @property
    def keeps(self) -> bool:
        """Whether one of the matrices is not quantized."""
        return KEEP_WIDTH in self.kinds[::4]


@dataclass(frozen=True)
class _Layer:
    """A stack of experts: matrices of gate and then up, matrices of down, [2, experts, width] biases of gate and up."""

    first: _Packed
    last: _Packed
    bias: Tensor | None


@dataclass(frozen=True)
class _Route:
    """Which expert computes which slot: each slot alone, or `pieces` of `rows` slots each, in `order` by expert."""

    index: Tensor
    experts: int
    rows: int = 1
    pieces: int = 0
    order: Tensor | None = None
    work: Tensor | None = None
    starts: Tensor | None = None
    ends: Tensor | None = None


class TritonKernels:
    """`ProductKernels` in Triton. In its interpreter (TRITON_INTERPRET=1), they run on the CPU instead, for tests."""

    name = "triton"
    takes_patches = False
    encodings = frozenset({"int", "table", "trellis", "unquantized"})

    def unusable(self, device: torch.device) -> str | None:
        """See `ProductKernels`."""
        if device.type != ("cpu" if _interpreted() else "cuda"):
            return "they are for CUDA GPUs"
        if device.type == "cuda" and not torch.cuda.is_available():
            return "torch finds no CUDA GPU"
        if find_spec("triton") is None:
            return "Triton is not installed: pip install 'moqa[gpu]'"
        if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return "they need compute capability 8.0 (Ampere)"
        return None

    def linear(self, matrix: PackedMatrix, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `ProductKernels`."""
        if not isinstance(matrix.prepared, _Packed):
            matrix.prepared = _prepare([matrix])
        packed = matrix.prepared
        x = _ready(x, packed)
        if bias is not None:
            if bias.shape != matrix.shape[:1] or bias.device != x.device:
                raise ValueError(f"bias {tuple(bias.shape)} on {bias.device} for {matrix.shape[0]} outputs")
            bias = bias.contiguous()
        y = x.new_empty(*x.shape[:-1], matrix.shape[0])
        if y.numel():
            with torch.cuda.device_of(x):
                _product(packed, x.view(-1, x.shape[-1]), y, bias)
        return y

    def experts(self, stack: ExpertStack, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """See `ProductKernels`. Launches the same few kernels for any number of experts, never waits for the GPU."""
        layer = _prepared_layer(stack)
        x = _ready(x, layer.first)
        if x.dim() != 2 or index.shape != weights.shape or index.shape[:1] != x.shape[:1] or index.dim() != 2:
            raise ValueError(f"x {tuple(x.shape)}, index {tuple(index.shape)}, weights {tuple(weights.shape)}")
        if index.device != x.device or weights.device != x.device:
            raise ValueError(f"index on {index.device}, weights on {weights.device}, x on {x.device}")
        (tokens, top_k), (inner, hidden) = index.shape, layer.first.shape
        y = torch.zeros_like(x)
        if not index.numel():
            return y
        index, weights = index.to(torch.int64).contiguous(), weights.contiguous()
        with torch.cuda.device_of(x):
            route = _route(index, len(stack.gate), sort=layer.first.keeps or layer.last.keeps)
            middle = x.new_empty(tokens * top_k, inner, dtype=torch.float32)
            _product(layer.first, x, middle, layer.bias, activation=stack.activation, route=route, shared=top_k)
            parts = x.new_empty(tokens * top_k, hidden, dtype=torch.float32)
            _product(layer.last, middle, parts, stack.down_bias, route=route)
            grid = (tokens, -(-hidden // 512))
            _ops().combine[grid](y, parts, index, weights, route.experts, hidden, top_k, SIZE=512, **_options())
        return y


def _ready(x: Tensor, packed: _Packed) -> Tensor:
    features, device = packed.shape[1], packed.table.device
    if x.dtype not in (torch.float32, torch.bfloat16) or x.shape[-1] != features or x.device != device:
        raise ValueError(
            f"{x.dtype} {tuple(x.shape)} on {x.device}: a row has {features} float32 or bfloat16 inputs on {device}"
        )
    return x.contiguous()


def _kind(matrix: PackedMatrix) -> tuple[int, int, int, int]:
    scheme = matrix.scheme
    if scheme.is_unquantized:
        return KEEP_WIDTH, BLOCK, 0, 0
    form = _FORMS[scheme.encoding] if scheme.is_coded else int(scheme.symmetric)
    return scheme.width, scheme.group_size, form, int(scheme.scale_dtype == "float16")


def _prepare(matrices: Sequence[PackedMatrix]) -> _Packed:
    for matrix in matrices:
        check_encoding(TritonKernels(), matrix)
    shapes = {matrix.shape for matrix in matrices}
    devices = {tensor.device for matrix in matrices for tensor in matrix.buffers()}
    if len(shapes) != 1 or len(devices) != 1:
        raise ValueError(f"matrices of shapes {shapes} on {devices}")
    (shape,), (device,) = shapes, devices
    kinds = sorted({_kind(matrix) for matrix in matrices})
    sizes = sorted({kind[1] for kind in kinds if kind[0] != KEEP_WIDTH})
    groups = [-(-shape[1] // size) for size in sizes]
    entries = []
    for matrix in matrices:
        tensors = dict(matrix.named_buffers())
        # the kernels are compiled for this alignment: every allocation on a GPU has it, and a mapped file, too
        if any(tensor.data_ptr() % (4 if name == "factor" else 16) for name, tensor in tensors.items()):
            raise ValueError("tensors of a matrix must be aligned to 16 bytes, factors to 4")
        weights = [tensors["weight"]] if matrix.scheme.is_unquantized else matrix.planes
        addresses = [tensor.data_ptr() for tensor in weights] + [0] * (3 - len(weights))
        second = "factor" if matrix.scheme.is_coded else "zero"
        addresses += [tensors[name].data_ptr() if name in tensors else 0 for name in ("scale", second)]
        before = 0 if matrix.scheme.is_unquantized else sizes.index(matrix.scheme.group_size)
        inputs = sum(count * size for count, size in zip(groups[:before], sizes[:before], strict=True))
        entries.append([*addresses, 4 * kinds.index(_kind(matrix)), inputs, sum(groups[:before])])
    padded = tuple(number for size in sizes for number in (size, 1 << (size - 1).bit_length()))
    return _Packed(torch.tensor(entries, device=device), tuple(itertools.chain(*kinds)), padded, shape)


def _prepared_layer(stack: ExpertStack) -> _Layer:
    prepared = stack.prepared
    if prepared is None or prepared.ended or not isinstance(prepared.made, _Layer):
        prepared = stack.prepared = Prepared(_prepare_layer(stack), stack.matrices())
    return prepared.made


def _prepare_layer(stack: ExpertStack) -> _Layer:
    parts = (stack.gate, stack.up, stack.down)
    if len({len(part) for part in parts}) != 1:
        raise ValueError(f"{', '.join(str(len(part)) for part in parts)} matrices of gate, up and down")
    first, last = _prepare([*stack.gate, *stack.up]), _prepare(stack.down)
    if first.shape != last.shape[::-1] or first.table.device != last.table.device:
        raise ValueError(
            f"experts of shapes {first.shape} on {first.table.device}, {last.shape} on {last.table.device}"
        )
    for bias, packed in ((stack.gate_bias, first), (stack.up_bias, first), (stack.down_bias, last)):
        wanted = (len(stack.gate), packed.shape[0]), packed.table.device
        if bias is not None and ((tuple(bias.shape), bias.device) != wanted or not bias.is_contiguous()):
            raise ValueError(f"a bias of {tuple(bias.shape)} on {bias.device}, not {wanted}")
    given = [bias for bias in (stack.gate_bias, stack.up_bias) if bias is not None]
    if not given:
        return _Layer(first, last, None)
    pair = [torch.zeros_like(given[0]) if bias is None else bias for bias in (stack.gate_bias, stack.up_bias)]
    return _Layer(first, last, torch.stack(pair))


def _options() -> dict[str, Any]:
    # the kernels fuse operations explicitly: the compiler might choose differently in each and round differently
    return {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}


def _quantize(packed: _Packed, x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantized values of rows, one group size after the other.

    Returns:
        [rows, inputs of whole groups] int8 q, and [rows, groups] int64 steps: the sum of q above the bits of its
        float32 scale.
    """
    (rows, features), sizes = x.shape, packed.sizes[::2]
    groups = [-(-features // size) for size in sizes]
    inputs = sum(count * size for count, size in zip(groups, sizes, strict=True))
    q = x.new_empty(rows, inputs, dtype=torch.int8)
    steps = x.new_empty(rows, sum(groups), dtype=torch.int64)
    if sizes:
        count = max(1, 1024 // max(packed.sizes))
        _ops().quantize[(rows, -(-max(groups) // count))](
            x, q, steps, features, inputs, sum(groups), SIZES=packed.sizes, COUNT=count, **_options()
        )
    return q, steps


def _route(index: Tensor, experts: int, sort: bool) -> _Route:
    slots = index.numel()
    if slots <= FEW_SLOTS * experts and not sort:
        return _Route(index, experts)
    rows = _power_of_two(slots // experts)
    flat = index.flatten()
    chosen, order = torch.where((flat < 0) | (flat >= experts), experts, flat).sort(stable=True)
    starts = torch.searchsorted(chosen, torch.arange(experts + 1, device=index.device))
    ends = ((starts.diff() + (rows - 1)) // rows).cumsum(0)
    # an upper bound: only the device knows how many there are
    pieces = (slots + min(experts, slots) * (rows - 1)) // rows
    work = torch.searchsorted(ends, torch.arange(pieces, device=index.device), right=True)
    return _Route(index, experts, rows, pieces, order, work, starts, ends)


def _power_of_two(rows: int) -> int:
    """Rows of a work item for the tensor cores."""
    return min(max(16, 1 << (rows - 1).bit_length()), 64)


def _product(
    packed: _Packed,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None = None,
    route: _Route | None = None,
    shared: int = 1,
) -> None:
    """Compute all slots: slot s multiplies row s // shared of x, with its own expert's matrix if there is a route."""
    (q, steps), (out, features) = _quantize(packed, x), packed.shape
    slots, experts = y.numel() // out, 1 if route is None else route.experts
    nvidia = not _interpreted() and torch.version.hip is None
    numbers = (slots, shared, experts, features, q.shape[1], steps.shape[1], out)
    if slots <= FEW_ROWS and not packed.keeps if route is None else route.order is None:
        count = min(8, 1 << (slots - 1).bit_length()) if route is None else 1
        _ops().few[(-(-out // TILE), -(-slots // count))](
            packed.table, y, bias, q, steps, None if route is None else route.index, *numbers,
            KINDS=packed.kinds, ROUTED=route is not None, ACTIVATION=activation, ROWS=count,
            NVIDIA=nvidia, **_options(),
        )  # fmt: skip
        return
    sorted_slots = (None,) * 4 if route is None else (route.order, route.work, route.starts, route.ends)
    count = _power_of_two(slots) if route is None else route.rows
    _ops().many[(-(-out // _OUT), -(-slots // count) if route is None else route.pieces)](
        packed.table, y, bias, q, steps, x, *sorted_slots, *numbers,
        KINDS=packed.kinds, ROUTED=route is not None, ACTIVATION=activation, OUT=_OUT, ROWS=count,
        NVIDIA=nvidia, EMULATED=_interpreted(), **_options(),
    )  # fmt: skip
