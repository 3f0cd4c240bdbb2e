"""How long the pieces of the work take on this machine, by doing each once."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from moqa.calibration.inputs import InputStatistics, by_input
from moqa.calibration.stacks import STACK_WEIGHTS, UnitStack
from moqa.errors import MoqaError
from moqa.format.scheme import Scheme
from moqa.kernels import PackedMatrix, find_kernels
from moqa.methods import Method
from moqa.models.products import fast_dtype, product
from moqa.models.units import Unit
from moqa.models.view import ModelView
from moqa.originals import folder as original
from moqa.originals.file import File
from moqa.planning import Plan
from moqa.profiling import SELF
from moqa.profiling.record import Settings
from moqa.profiling.sensitivity import PROBES
from moqa.quantization.layer import solve

# what is read of a file to see how fast its storage is: pieces from all over it
_PIECES, _PIECE = 32, 8 * 2**20
# seconds of one core for a byte that is read or written beside other work: copied, looked at for NaN, hashed, passed on
_HANDLED = 1.2e-9
# bytes a second of weights that are in memory, with the arithmetic of a few tokens
_MEMORY = 4e9
# tokens of a window, and features of an expert that costs nothing but its calls
_WINDOW, _FEW = 256, 64
# a model's own code does about three times what is timed of it here: views, casts and checks, with cold caches
_CODE = 3


class Clock:
    """Times one piece of each kind of work, with random numbers of the right shapes.

    Args:
        method: how the model is quantized.
        storage: bytes a second that are read; writing is taken to be as fast, and at its cost.
    """

    def __init__(self, method: Method, storage: float) -> None:
        self._method, self._storage = method, storage
        self._found: dict[tuple, float] = {}

    def layer(self, view: ModelView, layer: int, plan: Plan, tokens: int, ahead: bool) -> float:
        """Seconds that a decoder layer takes; `ahead`: storage and arithmetic do not wait for each other."""
        units = view.block_units(layer)
        experts = _count(units)
        read = sum(unit.weights * view.itemsize(unit) for unit in units)
        written = sum(plan.units[unit.name].stored_bytes(unit.shape) for unit in units)
        stored, seconds = (read + written) / self._storage, 0.0
        for sharing in by_input(units).values():
            unit = sharing[0]
            scheme, features = plan.units[unit.name], unit.shape[1]
            if scheme.is_unquantized:
                continue
            rows = sum(other.shape[0] for other in sharing)
            seconds += self._solved(rows, features, scheme, experts if unit.expert is not None else 1)
            if self._method.needs_data:
                seen = tokens * max(view.top_k, 1) / experts if unit.expert is not None else tokens
                # inputs are summed up and multiplied for the layer as it was, and multiplied for the quantized one
                seconds += seen * (self._summed(features) + self._multiplied(rows, features, view.stored_dtype(unit)))
                seconds += seen * self._quantized(rows, features, scheme)
        if self._method.needs_data:
            # through the layer as it was, and through the quantized one
            seconds += 2 * tokens * self._around(view, layer, experts)
        if ahead:
            return max(stored, seconds + (read + written) * _HANDLED / torch.get_num_threads())
        return stored + seconds

    def profile(
        self, view: ModelView, plan: Plan, tokens: dict[str, int], settings: Settings, together: int, whole: bool
    ) -> float:
        """Seconds of the plan's profile.

        Args:
            view: the model.
            plan: schemes of the units.
            tokens: distribution -> how many there are.
            settings: its own; the model writes its own text in as many steps as a window has tokens.
            together: experts that are measured together.
            whole: whether the model is in memory while it writes its own text.
        """
        seconds, everything, probes = 0.0, sum(tokens.values()), len(PROBES)
        for layer in range(len(view.blocks)):
            units = view.block_units(layer)
            experts = _count(units)
            slices = -(-experts // together) if view.top_k else 1
            for unit in units:
                seen = everything * (view.top_k / experts if unit.expert is not None else 1)
                rows, features = unit.shape
                # forward; then back, again for every slice, on half of the tokens; and errors at all probed widths
                seconds += (
                    seen * self._multiplied(rows, features, view.stored_dtype(unit)) * (1 + 3 * slices / 2 + probes / 2)
                )
                if self._method.needs_data and settings.sensitivity:
                    seconds += len(tokens) * self._solved(probes * rows, features, plan.units[unit.name], 1) / 2
            seconds += 3 * sum(unit.weights * view.itemsize(unit) for unit in units) / self._storage
            passes = 1 + (3 * slices if settings.sensitivity else 0)
            seconds += everything * passes * self._around(view, layer, experts)
            if SELF in tokens:
                written = max(1, tokens[SELF] // settings.context)
                seconds += settings.context * (
                    written * self._between(view, written) + experts * self._few(view, layer)
                )
        if SELF in tokens:
            weights = sum(unit.weights * view.itemsize(unit) for unit in view.units.values())
            seconds += settings.context * weights / (_MEMORY if whole else self._storage)
        return seconds

    def compared(self, view: ModelView, plan: Plan, tokens: int, checkpoints: int) -> float:
        """Seconds of comparing so many checkpoints with the original on tokens of text, see `moqa.evaluation.proof`."""
        original = each = 0.0
        for layer in range(len(view.blocks)):
            units = view.block_units(layer)
            experts = _count(units)
            for unit in units:
                seen = tokens * (view.top_k / experts if unit.expert is not None else 1)
                original += seen * self._multiplied(*unit.shape, view.stored_dtype(unit))
                # the reference kernels unpack a matrix once, and multiply in float32
                each += seen * self._multiplied(*unit.shape, torch.float32)
                if not plan.units[unit.name].is_unquantized:
                    each += self._unpacked(*unit.shape, plan.units[unit.name])
            around = tokens * self._around(view, layer, experts)
            original, each = original + around, each + around
            original += sum(unit.weights * view.itemsize(unit) for unit in units) / self._storage
        return original + checkpoints * (each + tokens * self._scored(view))

    def _solved(self, rows: int, features: int, scheme: Scheme, alike: int) -> float:
        """Seconds to quantize [rows, features], as a share of the stack in which that happens."""
        if self._method.store is not None:
            return self._stored(rows, features, scheme)
        count = max(1, min(alike, STACK_WEIGHTS // (rows * features)))

        def make() -> Callable[[], object]:
            found = [InputStatistics(features) for _ in range(count)]
            for inputs in found:
                x = torch.randn(64, features)
                inputs.add(x, 1.0, check=False)
                inputs.add(x, 1.0, check=True)
            units = [Unit(f"{n}", 0, "expert", "", n, (rows, features), "", "") for n in range(count)]
            stack = UnitStack([[unit] for unit in units], torch.randn(count, rows, features), found, scheme)
            return lambda: list(solve(stack, {unit.name: scheme for unit in units}, self._method))

        return self._once(("solve", rows, features, scheme), make) / count

    def _stored(self, rows: int, features: int, scheme: Scheme) -> float:
        def make() -> Callable[[], object]:
            weights, store = torch.randn(rows, features).bfloat16(), self._method.store
            assert store is not None
            return lambda: store(weights, scheme)

        return self._once(("store", rows, features, scheme), make)

    def _summed(self, features: int) -> float:
        def make() -> Callable[[], object]:
            x, inputs = torch.randn(256, features), InputStatistics(features)
            return lambda: inputs.add(x, 1.0, check=False)

        return self._once(("sum", features), make) / 256

    def _multiplied(self, rows: int, features: int, dtype: torch.dtype) -> float:
        def make() -> Callable[[], object]:
            x, matrix = torch.randn(256, features), torch.randn(features, rows).to(dtype)
            return lambda: product(x, matrix, fast_dtype(dtype))

        return self._once(("product", rows, features, dtype), make) / 256

    def _quantized(self, rows: int, features: int, scheme: Scheme) -> float:
        def make() -> Callable[[], object]:
            matrix, x = _packed(rows, features, scheme), torch.randn(256, features)
            return lambda: find_kernels().linear(matrix, x)

        return self._once(("packed", rows, features, scheme), make) / 256

    def _unpacked(self, rows: int, features: int, scheme: Scheme) -> float:
        def make() -> Callable[[], object]:
            return _packed(rows, features, scheme).dense

        return self._once(("unpacked", rows, features, scheme), make)

    def _scored(self, view: ModelView) -> float:
        """Seconds of a token's predictions by a checkpoint and its original, and what is between them."""
        rows, features = view.model.get_input_embeddings().weight.shape

        def make() -> Callable[[], object]:
            table, x = torch.randn(rows, features), torch.randn(256, features)
            return lambda: _divergence(x, table)

        return self._once(("scored", rows, features), make) / 256

    def _around(self, view: ModelView, layer: int, experts: int) -> float:
        """Seconds of a token in a layer beside the products with its weights, where a batch goes through together."""
        return self._between(view, view.task.batch_size) + experts / view.task.batch_size * self._few(view, layer)

    def _between(self, view: ModelView, tokens: int) -> float:
        """Seconds of a token in a layer between the products with its weights, where so many go through together."""
        config = view.model.config.get_text_config()
        hidden, heads = config.hidden_size, getattr(config, "num_attention_heads", 1) or 1
        size = getattr(config, "head_dim", None) or max(1, hidden // heads)

        def make() -> Callable[[], object]:
            x = torch.randn(-(-tokens // _WINDOW), min(tokens, _WINDOW), hidden)
            q = torch.randn(len(x), heads, x.shape[1], size)
            return lambda: _norms_and_attention(x, q)

        return _CODE * self._once(("between", hidden, heads, size, tokens), make) / tokens

    def _few(self, view: ModelView, layer: int) -> float:
        """Seconds that an expert takes for hardly any tokens."""
        if view.experts_path(layer) is None:
            return 0.0

        def make() -> Callable[[], object]:
            x, index = torch.randn(64, _FEW), torch.randint(4, (64, 2))
            return lambda: _expert(x, index)

        return _CODE * self._once(("few",), make)

    def _once(self, key: tuple, make: Callable[[], Callable[[], object]]) -> float:
        """Seconds of a piece of work; a short one is done again, since the first time finds cold caches."""
        if key not in self._found:
            work, took = make(), list[float]()
            while len(took) < 3 and sum(took) < 0.2:
                began = time.perf_counter()
                work()
                took.append(time.perf_counter() - began)
            # not the least of them: nothing that takes hours is done at the best speed
            self._found[key] = fmean(took[1:] or took)
        return self._found[key]


def storage_rate(folder: Path) -> float:
    """Bytes a second of reading the largest file as a run reads it: what lies in the system's memory comes from there.

    Raises:
        MoqaError: if it can be read no more.
    """
    path = max(original.weight_files(folder), key=lambda path: path.stat().st_size)
    try:
        with File(path, once=True) as file:
            size = min(_PIECE, file.size)
            buffer = np.zeros(size, np.uint8)
            places = [(file.size - size) * piece // _PIECES for piece in range(_PIECES)]
            began = time.perf_counter()
            for place in places:
                file.fill(buffer, place)
            return len(places) * size / (time.perf_counter() - began)
    except OSError as error:
        raise MoqaError(f"{path} can be read no more", str(error)) from None


def _count(units: Sequence[Unit]) -> int:
    """How many experts some units belong to; those of a layer without any count as one's."""
    return max(1, len({unit.expert for unit in units if unit.expert is not None}))


def _packed(rows: int, features: int, scheme: Scheme) -> PackedMatrix:
    stored = scheme.tensors((rows, features))
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in stored.items()}
    return PackedMatrix(scheme, (rows, features), tensors)


def _norms_and_attention(x: Tensor, q: Tensor) -> None:
    """What a decoder layer does to [windows, tokens, hidden] and [windows, heads, tokens, size] without its weights."""
    half = q.shape[-1] // 2
    for _ in range(2):
        x + x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * x[0, 0]
    for _ in range(2):
        q * q[0, 0] + torch.cat([-q[..., half:], q[..., :half]], -1) * q[0, 0]
    scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).contiguous()


def _divergence(x: Tensor, table: Tensor) -> Tensor:
    """KL divergence of [tokens, features] predictions from predictions."""
    logp, true = ((x @ table.T).log_softmax(-1) for _ in range(2))
    return (true.exp() * (true - logp)).sum(1)


def _expert(x: Tensor, index: Tensor) -> None:
    """What calling one expert takes, however small it is."""
    rows, _ = (index == 1).nonzero(as_tuple=True)
    gate, up = (x[rows] @ x.T).chunk(2, -1)
    torch.zeros_like(x).index_add_(0, rows, (silu(gate) * up) @ x[: gate.shape[1]])
