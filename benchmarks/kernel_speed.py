"""Speed of the kernels: against read bandwidth, torch's bf16, ONNX Runtime, llama.cpp and transformers' experts.

Writes runs/bench/kernels.json; every ratio is from one run in which the contenders took turns.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from ggml_product import ggml_calls
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table
from timing import take_turns
from torch.nn.functional import linear
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from moqa.format.grid import Grid
from moqa.format.levels import LevelGrid
from moqa.format.planes import pack
from moqa.format.scheme import Scheme
from moqa.kernels import ExpertStack, PackedMatrix, find_kernels
from moqa.kernels.native import paths, read, use_path

OUT = Path(__file__).parents[1] / "runs" / "bench" / "kernels.json"
IN, FEATURES, BATCH = 2048, 5632, 256
FORMS = [*(f"int {w}" for w in range(2, 9)), "table 2", "table 3", "table 4", "trellis 1", "trellis 2", "trellis 3"]
ONNX_FORMS = ("int 2", "int 4", "int 8")
# types of llama.cpp with as many bits as a trellis
LLAMA_FORMS = {"trellis 2": "IQ2_XS", "trellis 3": "IQ3_S"}
BEYOND_CACHE = 160 * 2**20
# much more for the yardstick: part of what it reads again and again would be found in a large shared cache
YARDSTICK = 2**30
EXPERTS, TOP_K, EXPERT_WIDTH, MIX = 64, 8, 1024, (2, 3, 4, 8)
native = find_kernels("native")


def readers(memory: torch.Tensor) -> dict[str, Callable[[int], object]]:
    """Ways to read memory and do next to nothing with it; the faster one is the yardstick."""
    words = memory.view(torch.int64)
    return {"read": lambda _: read(memory), "sum": lambda _: words.sum()}


READERS = ("read", "sum")


def random_matrix(out: int, features: int, width: int, encoding: str = "int") -> PackedMatrix:
    scheme = Scheme(width=width, encoding=encoding)
    integers = torch.randint(0, 2**width, (out, features), dtype=torch.uint8)
    groups = features // scheme.group_size
    if scheme.is_coded:
        factor, bits = torch.randint(1, 64, (out, groups), dtype=torch.uint8), torch.full((out,), width)
        codes = LevelGrid(encoding, torch.full((out,), 1e-4).bfloat16(), factor, scheme.group_size, bits, (out,))
        return PackedMatrix(scheme, (out, features), codes.stored(pack(integers, width)))
    scale = (torch.rand(out, groups) * 0.02 + 0.01).bfloat16()
    zero = torch.randint(100, 150, (out, groups), dtype=torch.uint8)
    grid = Grid(scale, zero, scheme.group_size, torch.tensor(2**width - 1))
    return PackedMatrix(scheme, (out, features), grid.stored(pack(integers, width)))


def copies_of(matrix: PackedMatrix) -> list[PackedMatrix]:
    """As many copies as do not fit in the cache together."""
    size = matrix.scheme.stored_bytes(matrix.shape)
    tensors = dict(matrix.named_buffers())
    return [
        PackedMatrix(matrix.scheme, matrix.shape, {name: tensor.clone() for name, tensor in tensors.items()})
        for _ in range(max(2, BEYOND_CACHE // size))
    ]


def onnx_calls(x: torch.Tensor, width: int, count: int, threads: int) -> Callable[[int], object]:
    """MatMulNBits with groups of 64 and 8-bit activations, on `count` sets of weights."""
    random = np.random.default_rng(0)
    blocks = IN // 64
    bindings = []
    for _ in range(count):
        packed = random.integers(0, 256, (FEATURES, blocks, 8 * width), dtype=np.uint8)
        scales = (random.random(FEATURES * blocks) * 0.01).astype(np.float32)
        node = helper.make_node(
            "MatMulNBits", ["x", "q", "s"], ["y"], domain="com.microsoft", K=IN, N=FEATURES, bits=width,
            block_size=64, accuracy_level=4,
        )  # fmt: skip
        graph = helper.make_graph(
            [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, IN])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, FEATURES])],
            [
                helper.make_tensor("q", TensorProto.UINT8, packed.shape, packed.tobytes(), raw=True),
                helper.make_tensor("s", TensorProto.FLOAT, scales.shape, scales.tobytes(), raw=True),
            ],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy()))
        binding.bind_output("y")
        bindings.append((session, binding))

    def call(number: int) -> object:
        session, binding = bindings[number % len(bindings)]
        return session.run_with_iobinding(binding)

    return call


def linear_rows(threads: int) -> list[dict]:
    found = []
    memory = torch.ones(YARDSTICK, dtype=torch.uint8)
    dense = [torch.randn(FEATURES, IN).bfloat16() for _ in range(BEYOND_CACHE // (2 * FEATURES * IN))]
    for rows in (1, 4, BATCH):
        x = torch.randn(rows, IN)
        half = x.bfloat16()
        for form in FORMS:
            encoding, width = form.split()[0], int(form.split()[1])
            packed = copies_of(random_matrix(FEATURES, IN, width, encoding))
            contenders: dict[str, Callable[[int], object]] = {
                "moqa": lambda n, packed=packed, x=x: native.linear(packed[n % len(packed)], x),
                "bf16": lambda n, half=half: linear(half, dense[n % len(dense)]),
            }
            if rows == 1:
                contenders |= readers(memory)
            if form in ONNX_FORMS:
                contenders["onnxruntime"] = onnx_calls(x, width, len(packed), threads)
            if form in LLAMA_FORMS and rows == threads == 1:
                contenders["llama.cpp"] = ggml_calls(LLAMA_FORMS[form], x[0].numpy(), FEATURES, len(packed))
            times = take_turns(contenders, seconds=0.05 if rows < BATCH else 0.1)
            size = packed[0].scheme.stored_bytes((FEATURES, IN))
            bandwidth = memory.nbytes / min(times[name] for name in READERS) if rows == 1 else None
            found.append({
                "op": "linear", "rows": rows, "in": IN, "out": FEATURES, "width": form, "threads": threads,
                "microseconds": times["moqa"],
                "bandwidth_fraction": size / times["moqa"] / bandwidth if bandwidth else None,
                "read_gigabytes_per_second": bandwidth / 1e3 if bandwidth else None,
                "vs_bf16": times["bf16"] / times["moqa"],
                "vs_onnxruntime": times["onnxruntime"] / times["moqa"] if "onnxruntime" in times else None,
                "vs_llama_cpp": times["llama.cpp"] / times["moqa"] if "llama.cpp" in times else None,
            })  # fmt: skip
    return found


def path_rows() -> list[dict]:
    """One row on one thread, by the code for each set of instructions that this processor has."""
    found = []
    memory, x = torch.ones(YARDSTICK, dtype=torch.uint8), torch.randn(1, IN)
    for form in FORMS:
        packed = copies_of(random_matrix(FEATURES, IN, int(form.split()[1]), form.split()[0]))

        def run(number: int, path: str, packed: list[PackedMatrix] = packed) -> object:
            use_path(path)
            return native.linear(packed[number % len(packed)], x)

        times = take_turns({path: partial(run, path=path) for path in paths()} | readers(memory))
        size = packed[0].scheme.stored_bytes((FEATURES, IN))
        bandwidth = memory.nbytes / min(times[name] for name in READERS)
        found += [
            {"op": "path", "width": form, "path": path, "rows": 1, "threads": 1, "microseconds": times[path],
             "bandwidth_fraction": size / times[path] / bandwidth}
            for path in paths()
        ]  # fmt: skip
    use_path(paths()[0])
    return found


def mixed_stack() -> ExpertStack:
    def part(out: int, features: int) -> list[PackedMatrix]:
        return [random_matrix(out, features, MIX[expert % len(MIX)]) for expert in range(EXPERTS)]

    return ExpertStack(part(EXPERT_WIDTH, IN), part(EXPERT_WIDTH, IN), part(IN, EXPERT_WIDTH), "silu")


def dense_experts() -> OlmoeExperts:
    config = OlmoeConfig(hidden_size=IN, intermediate_size=EXPERT_WIDTH, num_experts=EXPERTS, num_experts_per_tok=TOP_K)
    config._experts_implementation = "grouped_mm"
    experts = OlmoeExperts(config).bfloat16().requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_(0, 0.02)
    return experts


def separate_linears(stack: ExpertStack, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The same mix through one linear call after the other, as a runtime without an experts call does it."""
    out = torch.zeros_like(x)
    for expert in index.unique().tolist():
        tokens, places = (index == expert).nonzero(as_tuple=True)
        rows = x[tokens]
        inner = torch.nn.functional.silu(native.linear(stack.gate[expert], rows)) * native.linear(
            stack.up[expert], rows
        )
        out.index_add_(0, tokens, native.linear(stack.down[expert], inner) * weights[tokens, places, None])
    return out


def experts_rows(threads: int, stack: ExpertStack, dense: OlmoeExperts) -> list[dict]:
    found = []
    memory = torch.ones(YARDSTICK, dtype=torch.uint8)
    for tokens in (1, 512):
        x = torch.randn(tokens, IN)
        half = x.bfloat16()
        draws = [torch.rand(tokens, EXPERTS).topk(TOP_K) for _ in range(16)]
        routed = [(draw.indices, draw.values.softmax(-1)) for draw in draws]
        contenders: dict[str, Callable[[int], object]] = {
            "moqa": lambda n, x=x, routed=routed: native.experts(stack, x, *routed[n % 16]),
            "separate": lambda n, x=x, routed=routed: separate_linears(stack, x, *routed[n % 16]),
        }
        for name in ("eager", "batched_mm", "grouped_mm"):
            if name != "batched_mm" or tokens == 1:  # it copies every token's experts: 100 GB for 512 tokens

                def run(n: int, name: str = name, half: torch.Tensor = half, routed: list = routed) -> object:
                    dense.config._experts_implementation = name
                    index, weights = routed[n % 16]
                    return dense(half, index, weights.bfloat16())

                contenders[name] = run
        if tokens == 1:
            contenders |= readers(memory)
        times = take_turns(contenders, rounds=5, seconds=0.1)
        theirs = min((times[name], name) for name in ("eager", "batched_mm", "grouped_mm") if name in times)
        size = sum(
            matrix.scheme.stored_bytes(matrix.shape) for part in (stack.gate, stack.up, stack.down) for matrix in part
        )
        bandwidth = memory.nbytes / min(times[name] for name in READERS) if tokens == 1 else None
        found.append({
            "op": "experts", "rows": tokens, "in": IN, "out": EXPERT_WIDTH, "width": "mixed-2/3/4/8",
            "threads": threads, "microseconds": times["moqa"],
            "bandwidth_fraction": size * TOP_K / EXPERTS / times["moqa"] / bandwidth if bandwidth else None,
            "read_gigabytes_per_second": bandwidth / 1e3 if bandwidth else None,
            "vs_bf16": theirs[0] / times["moqa"], "bf16": f"transformers {theirs[1]}", "vs_onnxruntime": None,
            "vs_separate": times["separate"] / times["moqa"],
        })  # fmt: skip
    return found


def show(rows: list[dict]) -> None:
    table = Table(title="kernels: theirs / ours, above 1 is faster")
    for name in ("op", "rows", "width", "threads", "us", "of bandwidth", "vs bf16", "vs ORT", "vs separate"):
        table.add_column(name, justify="right")
    for row in (row for row in rows if row["op"] != "path"):
        ratios = [row.get(key) for key in ("bandwidth_fraction", "vs_bf16", "vs_onnxruntime", "vs_separate")]
        table.add_row(
            *(str(row[key]) for key in ("op", "rows", "width", "threads")), f"{row['microseconds']:.0f}",
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        )  # fmt: skip
    Console(width=100).print(table)


def main() -> None:
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    stack, dense = mixed_stack(), dense_experts()
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        print(f"moqa: kernels on {threads} threads", file=sys.stderr, flush=True)
        rows += linear_rows(threads) + experts_rows(threads, stack, dense)
    torch.set_num_threads(1)
    rows += path_rows()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=1) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
