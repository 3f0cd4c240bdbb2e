"""One row times a matrix in a type of llama.cpp, by its own CPU library, as a contender of `kernel_speed.py`."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np

# numbers of ggml's types whose blocks begin with a float16 scale
TYPES = {"IQ2_XS": 17, "IQ3_S": 21}
_NODES = 8
# of a context, beside the data of its tensors
_ROOM = 2**20


class _Init(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_data", ctypes.c_bool))


class _Plan(ctypes.Structure):
    # what follows is ggml's own: room for more fields than there are
    _fields_ = (("work_size", ctypes.c_size_t), ("work", ctypes.c_void_p), ("rest", ctypes.c_byte * 112))


def ggml_calls(kind: str, x: np.ndarray, rows: int, count: int) -> Callable[[int], object]:
    """Products of `x` with `count` matrices of `rows` rows, on one thread; weights are random, scales are not.

    Args:
        kind: a name of `TYPES`.
        x: [inputs] float32.
        rows: of a matrix.
        count: of matrices.
    """
    base, cpu = _libraries()
    width, number = len(x), TYPES[kind]
    row, block = base.ggml_row_size(number, width), base.ggml_type_size(number)
    context = base.ggml_init(_Init(count * (rows * row + _ROOM) + _ROOM, None, False))
    vector = base.ggml_new_tensor_2d(context, 0, width, 1)
    ctypes.memmove(base.ggml_get_data(vector), x.ctypes.data, x.nbytes)
    random = np.random.default_rng(0)
    graphs = []
    for _ in range(count):
        weights = random.integers(0, 256, (rows * row // block, block), dtype=np.uint8)
        weights[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        matrix = base.ggml_new_tensor_2d(context, number, width, rows)
        ctypes.memmove(base.ggml_get_data(matrix), weights.ctypes.data, weights.nbytes)
        graph = base.ggml_new_graph_custom(context, _NODES, False)
        base.ggml_build_forward_expand(graph, base.ggml_mul_mat(context, matrix, vector))
        graphs.append(graph)
    plan = cpu.ggml_graph_plan(graphs[0], 1, None)
    work = ctypes.create_string_buffer(plan.work_size)
    plan.work = ctypes.addressof(work)

    def call(turn: int) -> object:
        # (the plan's memory lives as long as this function)
        return work, cpu.ggml_graph_compute(graphs[turn % count], ctypes.byref(plan))

    return call


def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    folder = Path(llama_cpp.__file__).parent / "lib"
    base, cpu = (ctypes.CDLL(str(folder / f"libggml-{name}.so")) for name in ("base", "cpu"))
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
    for function, result, arguments in (
        (base.ggml_init, pointer, (_Init,)),
        (base.ggml_row_size, size, (ctypes.c_int, number)),
        (base.ggml_type_size, size, (ctypes.c_int,)),
        (base.ggml_new_tensor_2d, pointer, (pointer, ctypes.c_int, number, number)),
        (base.ggml_get_data, pointer, (pointer,)),
        (base.ggml_mul_mat, pointer, (pointer, pointer, pointer)),
        (base.ggml_new_graph_custom, pointer, (pointer, size, ctypes.c_bool)),
        (base.ggml_build_forward_expand, None, (pointer, pointer)),
        (cpu.ggml_graph_plan, _Plan, (pointer, ctypes.c_int, pointer)),
        (cpu.ggml_graph_compute, ctypes.c_int, (pointer, pointer)),
    ):
        function.restype, function.argtypes = result, arguments
    return base, cpu
