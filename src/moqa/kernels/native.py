"""The C++ kernels (`native/`). They receive plain addresses, so this file checks dtypes, shapes and devices first.

Activations are quantized to 8 bits per group of inputs; sums within a group are exact integers. A row's result depends
neither on the number of threads nor on the other rows of the batch.
"""

import importlib
import os
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from moqa.format.encodings import ENCODINGS
from moqa.format.grid import Grid
from moqa.format.scheme import Scheme
from moqa.format.tiles import BLOCK, PLANES, TILE
from moqa.kernels.fitting import Columns, Rounded
from moqa.kernels.matrix import PackedMatrix, Prepared
from moqa.kernels.patch import Channels, Patch
from moqa.kernels.registry import ExpertStack, check_encoding

try:
    _native: Any = importlib.import_module("moqa.kernels._native")
except ImportError as error:
    _native, _missing = None, str(error)


# numbers of `Code` in native/matrix.h
_CODES = {"table": 1, "trellis": 2}
_DTYPES = (torch.float32, torch.bfloat16)

# the threads of OpenMP do not survive a fork, and a forked process would wait for them for ever
os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


class NativeKernels:
    """`ProductKernels` and `GridKernels` in C++, on as many threads as torch uses (`torch.set_num_threads`)."""

    name = "native"
    takes_patches = True
    encodings = frozenset(ENCODINGS)

    def unusable(self, device: torch.device) -> str | None:
        """See `ProductKernels`."""
        if _native is None:
            return f"they were not built ({_missing}): install moqa on a machine with a C++ compiler"
        return None if device.type == "cpu" else "they are for the CPU"

    def linear(self, matrix: PackedMatrix, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `ProductKernels`."""
        prepared = matrix.prepared or _prepare(matrix)
        x = _ready(x, matrix.shape[1])
        y = x.new_empty(*x.shape[:-1], matrix.shape[0])
        rows = y.numel() // matrix.shape[0]
        if bias is not None:
            if bias.shape != matrix.shape[:1] or bias.device.type != "cpu":
                raise ValueError(f"bias {tuple(bias.shape)} on {bias.device} for {matrix.shape[0]} outputs")
            bias = bias.float().contiguous()
        _native.linear(
            prepared, x.data_ptr(), y.data_ptr(), x.dtype == torch.bfloat16, rows, _address(bias),
            torch.get_num_threads(),
        )  # fmt: skip
        return y

    def experts(self, stack: ExpertStack, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """See `ProductKernels`."""
        prepared = _prepared_stack(stack)
        x = _ready(x, stack.gate[0].shape[1])
        if x.dim() != 2 or index.shape != weights.shape or index.shape[:1] != x.shape[:1] or index.dim() != 2:
            raise ValueError(f"x {tuple(x.shape)}, index {tuple(index.shape)}, weights {tuple(weights.shape)}")
        if index.device.type != "cpu" or weights.device.type != "cpu":
            raise ValueError(f"index on {index.device}, weights on {weights.device}: the kernels are for the CPU")
        index, weights = index.to(torch.int64).contiguous(), weights.float().contiguous()
        y = torch.empty_like(x)
        _native.experts(
            prepared, x.data_ptr(), y.data_ptr(), x.dtype == torch.bfloat16, *index.shape, index.data_ptr(),
            weights.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return y

    def fit_grid(self, weights: Tensor, widths: Tensor, scheme: Scheme, importance: Tensor | None) -> Rounded:
        """See `GridKernels`."""
        if weights.dtype not in _DTYPES or weights.device.type != "cpu":
            raise ValueError(f"{weights.dtype} on {weights.device}: weights are float32 or bfloat16 on the CPU")
        weights = weights.contiguous()
        count, out, features = weights.shape
        bits = widths.expand(count, out).to(torch.uint8).contiguous()
        weight = None if importance is None else _floats(importance)
        if weight is not None and weight.shape != (count, features):
            raise ValueError(f"importance {tuple(weight.shape)} for weights {tuple(weights.shape)}")
        groups = -(-features // scheme.group_size)
        scale = torch.empty(count, out, groups, dtype=getattr(torch, scheme.scale_dtype))
        zero = None if scheme.symmetric else torch.empty(count, out, groups, dtype=torch.uint8)
        error = torch.empty(count, out, groups, dtype=torch.float32)
        integers = torch.empty(weights.shape, dtype=torch.uint8)
        _native.fit(
            count, out, features, scheme.group_size, scheme.symmetric, scale.dtype == torch.float16,
            weights.dtype == torch.bfloat16, weights.data_ptr(), bits.data_ptr(), _address(weight), scale.data_ptr(),
            _address(zero), error.data_ptr(), integers.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        top = (2.0 ** bits[..., None].float() - 1).expand(scale.shape)
        return Rounded(Grid(scale, zero, scheme.group_size, top), integers, error)

    def fit_packed(self, weights: Tensor, scheme: Scheme) -> dict[str, Tensor]:
        """See `GridKernels`."""
        if weights.dtype not in _DTYPES or weights.device.type != "cpu" or weights.dim() != 2:
            raise ValueError(
                f"{weights.dtype} {tuple(weights.shape)} on {weights.device}: a float32 or bfloat16 matrix"
            )
        weights, (out, features) = weights.contiguous(), weights.shape
        # rows that fill up the last tile are zeros
        make = torch.zeros if out % TILE else torch.empty
        stored = {name: make(shape, dtype=dtype) for name, (dtype, shape) in scheme.tensors((out, features)).items()}
        scale, zero = stored["scale"], stored.get("zero")
        _native.fit_packed(
            out, features, scheme.group_size, scheme.symmetric, scale.dtype == torch.float16,
            weights.dtype == torch.bfloat16, weights.data_ptr(), scheme.width, scale.data_ptr(), _address(zero),
            [tensor.data_ptr() for name, tensor in stored.items() if name.startswith("p")], torch.get_num_threads(),
        )  # fmt: skip
        return stored

    def round_columns(self, columns: Columns, values: Tensor, first: int) -> None:
        """See `GridKernels`."""
        c, values = columns, _floats(values)
        count, features, out = c.work.shape
        groups, block = -(-features // c.group_size), values.shape[1]
        kinds = {"order": torch.int64, "integers": torch.uint8}
        wanted = {"order": (count, features), "work": (count, features, out), "scale": (count, groups, out),
                  "integers": (count, features, out)}  # fmt: skip
        if c.factor is not None:
            wanted["factor"] = (count, features, features)
        if c.coded is None:
            wanted |= {"offset": (count, groups, out), "top": (count, out)}
        for name, shape in wanted.items():
            _require(name, getattr(c, name), kinds.get(name, torch.float32), shape)
        if values.shape != (count, block, out) or not 0 <= first <= features - block:
            raise ValueError(f"values {tuple(values.shape)} from column {first} of {tuple(c.work.shape)}")
        begin, width, apart = [0], torch.empty(0, dtype=torch.uint8), TILE
        if c.coded is not None:
            apart = c.coded.apart
            begin = [0, *accumulate(c.coded.parts)]
            if begin[-1] != out or apart < 1:
                raise ValueError(f"parts of {c.coded.parts} rows, {apart} apart, in {out} rows")
            width = c.coded.width.to(torch.uint8)[:, begin[:-1]].contiguous()
        _native.round(
            count, out, features, c.group_size, groups, first, block, values.data_ptr(), c.work.data_ptr(),
            _address(c.factor), c.order.data_ptr(), c.scale.data_ptr(), _address(c.offset), _address(c.top),
            c.integers.data_ptr(), c.coded is not None and c.coded.encoding == "trellis", apart, begin,
            width.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip

    def pack(self, integers: Tensor, width: int) -> list[Tensor]:
        """See `GridKernels`."""
        if integers.dtype != torch.uint8 or integers.dim() != 2 or integers.device.type != "cpu":
            raise ValueError(f"integers are {integers.dtype} {tuple(integers.shape)} on {integers.device}")
        integers = integers.contiguous()
        tiles, blocks = (-(-side // size) for side, size in zip(integers.shape, (TILE, BLOCK), strict=True))
        planes = [torch.empty(tiles, blocks, 64 * bits, dtype=torch.uint8) for bits in PLANES[width]]
        _native.pack(
            *integers.shape, width, integers.data_ptr(), [p.data_ptr() for p in planes], torch.get_num_threads()
        )
        return planes


def paths() -> list[str]:
    """Instruction sets that the kernels have code for and this processor runs, the fastest first.

    >>> paths()
    ['avx512vbmi', 'avx512', 'avx2', 'portable']
    """
    return _native.paths()


def use_path(name: str) -> None:
    """Run on the code for one instruction set, for tests and measurements; the fastest is the default."""
    _native.set_path(name)


def read(data: Tensor) -> int:
    """Read every whole MiB of a tensor at the speed of memory; returns the XOR of its words, so that none is skipped.

    >>> read(torch.zeros(2**20, dtype=torch.uint8))
    0
    """
    return _native.read(data.data_ptr(), data.nbytes, torch.get_num_threads())


def layer(parts: dict[str, Any]) -> Any:
    """A decoder layer for `decoder`, see `native/decoder.h`.

    Args:
        parts: name -> matrix, stack of experts, float32 tensor, number, or None if the layer has no such part.
    """
    described: dict[str, Any] = {"activation": _native.Activation.silu}
    for name, part in parts.items():
        if isinstance(part, PackedMatrix):
            described[name] = part.prepared or _prepare(part)
        elif isinstance(part, ExpertStack):
            described[name] = _prepared_stack(part)
        elif isinstance(part, Tensor):
            if part.dtype != torch.float32 or not part.is_contiguous():
                raise ValueError(f"{name} is {part.dtype}: parts of a layer are contiguous float32")
            described[name] = part.data_ptr()
        elif isinstance(part, str):
            described[name] = getattr(_native.Activation, part)
        elif part is not None:
            described[name] = part
    return _native.Layer(described)


def decoder(layers: list[Any], norm: Tensor | None, epsilon: float, head: PackedMatrix) -> Any:
    """All layers, the last norm and the head; the caller keeps their tensors alive as long as the decoder."""
    return _native.Decoder(layers, _address(norm), epsilon, head.prepared or _prepare(head), head.shape[1])


def use_experts(model: Any, layer: int, stack: ExpertStack, counts: Tensor | None) -> Any:
    """Let a layer of a `decoder` compute with other experts; the caller keeps the result and `counts` alive.

    Args:
        model: from `decoder`.
        layer: number of the layer.
        stack: the experts.
        counts: [experts] int64, incremented for every token that an expert receives; None counts nothing.
    """
    if counts is not None:
        _require("counts", counts, torch.int64, (len(stack.gate),))
    prepared = _prepared_stack(stack)
    _native.use_experts(model, layer, prepared, _address(counts))
    return prepared


def past(keys: list[int], values: list[int], capacity: int, rounded: bool) -> Any:
    """Where each layer's [kv_heads, capacity, head_dim] float32 keys and values begin.

    Those that are `rounded` are bytes, [kv_heads, capacity, head_dim + 4], as a `GrowingLayer` has them.
    """
    return _native.Past(keys, values, capacity, rounded)


def decode(
    model: Any, past: Any, embedding: Tensor, *, position: int, angles: tuple[Tensor, Tensor], logits: Tensor
) -> None:
    """Run one token through a `decoder`: fills `logits`, and the past at `position`.

    Args:
        model: from `decoder`.
        past: from `past`, with room for the position.
        embedding: [hidden] of the token, float32.
        position: of the token.
        angles: cosines and sines of all positions, [positions, rotated] float32 each.
        logits: [vocabulary] float32.
    """
    cos, sin = angles
    _native.decode(
        model, past, embedding.data_ptr(), position, cos[position].data_ptr(), sin[position].data_ptr(),
        cos.shape[1], logits.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def _ready(x: Tensor, features: int) -> Tensor:
    if x.dtype not in _DTYPES or x.shape[-1:] != (features,) or x.device.type != "cpu":
        raise ValueError(f"{x.dtype} {tuple(x.shape)} on {x.device}: a row has {features} float32 or bfloat16 inputs")
    return x.contiguous()


def _floats(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise ValueError(f"{tensor.dtype} on {tensor.device}: the kernels take float32 on the CPU")
    return tensor.contiguous()


def _require(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    found = (tensor.dtype, tuple(tensor.shape), tensor.device.type)
    if found != (dtype, shape, "cpu") or not tensor.is_contiguous():
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, not {dtype} {shape}")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _prepare(matrix: PackedMatrix) -> Any:
    check_encoding(NativeKernels(), matrix)
    scheme, (out, features) = matrix.scheme, matrix.shape
    tensors = dict(matrix.named_buffers())
    if any(tensor.device.type != "cpu" for tensor in tensors.values()):
        raise ValueError("the native kernels take matrices on the CPU")
    # unquantized units have no groups; any size that a scheme can have will do
    matrix.prepared = _native.Matrix(
        out, features, scheme.width, scheme.group_size, [plane.data_ptr() for plane in matrix.planes],
        _address(tensors.get("scale")), _address(tensors.get("factor", tensors.get("zero"))),
        scheme.scale_dtype == "float16", _address(tensors.get("weight")), _CODES.get(scheme.storage.name, 0),
    )  # fmt: skip
    return matrix.prepared


def _prepared_stack(stack: ExpertStack) -> Any:
    if stack.prepared is None or stack.prepared.ended:
        stack.prepared = Prepared(_prepare_stack(stack), stack.matrices())
    return stack.prepared.made


def _prepare_stack(stack: ExpertStack) -> Any:
    parts = (stack.gate, stack.up, stack.down)
    shapes = [{matrix.shape for matrix in part} for part in parts]
    if any(len(sizes) != 1 for sizes in shapes) or shapes[0] != shapes[1] or shapes[0] != {s[::-1] for s in shapes[2]}:
        raise ValueError(f"experts of different shapes: {shapes}")
    if len({len(part) for part in parts}) != 1:
        raise ValueError(f"{', '.join(str(len(part)) for part in parts)} matrices of gate, up and down")
    biases = []
    for bias, part in zip((stack.gate_bias, stack.up_bias, stack.down_bias), parts, strict=True):
        if bias is not None:
            _require("a bias", bias, torch.float32, (len(part), part[0].shape[0]))
        biases.append(_address(bias))
    matrices = [[matrix.prepared or _prepare(matrix) for matrix in part] for part in parts]
    patches = [_prepare_patch(patch, stack) for patch in stack.patches]
    return _native.Experts(*matrices, *biases, getattr(_native.Activation, stack.activation), patches)


def _prepare_patch(patch: Patch, stack: ExpertStack) -> Any:
    if patch.prepared is None or patch.prepared.ended:
        width, hidden = stack.gate[0].shape
        parts = [_prepare_channels(part, len(stack.gate), width, hidden, part is patch.down)
                 for part in (patch.gate, patch.up, patch.down)]  # fmt: skip
        matrices = [channels.matrix for channels in patch.channels()]
        patch.prepared = Prepared(_native.Patch(*parts, patch.replaces), matrices)
    return patch.prepared.made


def _prepare_channels(channels: Channels | None, experts: int, width: int, hidden: int, columns: bool) -> Any:
    if channels is None:
        return _native.Channels(None, [], [], [])
    count, scheme = len(channels.channel), channels.matrix.scheme
    wanted = (hidden, count) if columns else (count, hidden)
    if channels.matrix.shape != wanted or channels.expert.shape != (count,):
        raise ValueError(f"{count} channels in a matrix of shape {channels.matrix.shape}: it must be {wanted}")
    if columns and not scheme.is_unquantized and scheme.group_size < count:
        raise ValueError(f"{count} columns in groups of {scheme.group_size}: all must be in one group")
    places = channels.expert * width + channels.channel
    inside = count == 0 or (int(places[0]) >= 0 and int(places[-1]) < experts * width)
    if not inside or not bool((places.diff() > 0).all()) or not bool((channels.channel < width).all()):
        raise ValueError(f"channels are not ascending, or out of range for {experts} experts of {width} channels")
    scale = [] if channels.scale is None else channels.scale.tolist()
    if len(scale) != (count if columns else 0):
        raise ValueError(f"{len(scale)} scales for {count} channels")
    begin = torch.searchsorted(channels.expert, torch.arange(experts + 1)).tolist()
    matrix = channels.matrix.prepared or _prepare(channels.matrix)
    return _native.Channels(matrix, begin, channels.channel.tolist(), scale)
