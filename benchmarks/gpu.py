"""Are the Triton kernels right on this machine's GPU, and how fast are they? One call answers both:

    python benchmarks/gpu.py

It takes a few minutes, most of them compiling, and writes runs/gpu/gpu.json. It needs a CUDA GPU, torch for CUDA and
Triton (`pip install 'moqa[gpu]'`). Exit status: 0 all right, 1 a number is wrong, 2 there is no GPU to run on.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

import moqa.kernels.triton as launcher
from moqa.format.grid import from_groups, to_groups
from moqa.format.levels import UPPER_LEVELS
from moqa.format.scheme import Scheme
from moqa.format.tiles import WIDTHS
from moqa.kernels import ACTIVATIONS, ExpertStack, PackedMatrix
from moqa.kernels.reference import ReferenceKernels, activate
from moqa.kernels.triton import TritonKernels

ROOT = Path(__file__).parents[1]
KERNELS, REFERENCE = TritonKernels(), ReferenceKernels()
ROWS = (1, 16, 256, 2048)
SHAPE = (4096, 4096)
# odd, and long enough for every loop to turn
CHECK_SHAPE, CHECK_EXPERT = (200, 4100), (600, 1032)
# as in OLMoE-1B-7B; widths as a plan mixes them
EXPERTS, TOP_K, HIDDEN, WIDTH, MIX = 64, 8, 2048, 1024, (2, 3, 4, 8)
TOKENS = (1, 512)
# weights of one measurement: more than any GPU keeps in its cache, as in a model
COLD_BYTES = 2**29


def random_matrix(shape: tuple[int, int], scheme: Scheme, device: torch.device) -> PackedMatrix:
    """Any bytes are the planes of some matrix."""
    tensors = {}
    for name, (dtype, stored) in scheme.tensors(shape).items():
        if dtype == torch.uint8:
            tensors[name] = torch.randint(256, stored, dtype=dtype, device=device)
        else:
            # levels are up to 63, factors too
            steps = 1 if scheme.is_unquantized else 1000 if scheme.is_coded else 2**scheme.width
            values = torch.randn(stored, device=device) * (shape[1] ** -0.5 / steps)
            tensors[name] = (values.abs() if name == "scale" else values).to(dtype)
    return PackedMatrix(scheme, shape, tensors)


def moved(matrix: PackedMatrix, device: torch.device) -> PackedMatrix:
    tensors = {name: tensor.to(device) for name, tensor in matrix.named_buffers()}
    return PackedMatrix(matrix.scheme, matrix.shape, tensors)


# ---- is it right?


def rounded(x: Tensor, scheme: Scheme) -> Tensor:
    """Activations as the kernels round them, float32."""
    if scheme.is_unquantized:
        return x.float()
    groups = to_groups(x.float(), scheme.group_size)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale >= 1e-36, 1 / scale, 0)
    return from_groups((groups * inverse).round() * scale, x.shape[-1])


def expected_experts(stack: ExpertStack, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    total = torch.zeros(x.shape)
    for expert in range(len(stack.gate)):
        gate, up, down = stack.gate[expert], stack.up[expert], stack.down[expert]
        tokens, places = (index == expert).nonzero(as_tuple=True)
        found = x[tokens]
        inner = activate(
            stack.activation,
            REFERENCE.linear(gate, rounded(found, gate.scheme), stack.gate_bias[expert]),
            REFERENCE.linear(up, rounded(found, up.scheme), stack.up_bias[expert]),
        )
        out = REFERENCE.linear(down, rounded(inner, down.scheme), stack.down_bias[expert])
        total.index_add_(0, tokens, out * weights[tokens, places, None])
    return total


class Checks:
    """Collects what was checked, and prints what is wrong."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self._printed = 0

    def close(self, name: str, y: Tensor, wanted: Tensor, bound: float) -> None:
        error = float((y.cpu().float() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
        # a comparison with NaN is false, as it should be
        self.true(name, error <= bound, f"error {error:.1e} of the largest output")

    def equal(self, name: str, first: Tensor, second: Tensor) -> None:
        self.true(name, torch.equal(first, second), f"{int((first != second).sum())} numbers differ")

    def true(self, name: str, right: bool, found: str) -> None:
        self.lines.append({"check": name, "right": right, "found": found})
        if not right:
            print(f"  WRONG: {name}: {found}", flush=True)

    def print_count(self, name: str) -> None:
        new = self.lines[self._printed :]
        self._printed = len(self.lines)
        print(f"  {name}: {sum(line['right'] for line in new)} of {len(new)} right", flush=True)


def check_linear(checks: Checks, device: torch.device) -> None:
    for width in (*WIDTHS, 16):
        for group, symmetric, half in ((32, False, False), (64, True, True), (96, False, True), (128, False, False)):
            scheme = Scheme(
                width=width, group_size=group, symmetric=symmetric and width > 1,
                scale_dtype="float16" if half else "bfloat16",
            )  # fmt: skip
            check_matrix(checks, f"linear, width {width}, groups of {group}", scheme, device)
        checks.print_count(f"linear, width {width}")
    for encoding, widths in UPPER_LEVELS.items():
        for width, (group, half) in product(widths, ((64, False), (160, True))):
            scheme = Scheme(
                encoding=encoding, width=width, group_size=group, scale_dtype="float16" if half else "bfloat16"
            )
            check_matrix(checks, f"linear, {encoding} {width}, groups of {group}", scheme, device)
        checks.print_count(f"linear, {encoding}")
    out, features = CHECK_SHAPE
    matrix, x = random_matrix(CHECK_SHAPE, Scheme(width=4), device), torch.randn(40, features, device=device)
    x[3, 4] = float("nan")
    for rows in (8, 40):
        lost = KERNELS.linear(matrix, x[:rows]).isnan()
        found = f"{int(lost.sum())} outputs are NaN"
        checks.true(
            f"a NaN is lost in its own row alone, {rows} rows", bool(lost[3].all()) and lost.sum() == out, found
        )


def check_matrix(checks: Checks, name: str, scheme: Scheme, device: torch.device) -> None:
    out, features = CHECK_SHAPE
    matrix = random_matrix(CHECK_SHAPE, scheme, torch.device("cpu"))
    there, x, bias = moved(matrix, device), torch.randn(300, features), torch.randn(out)
    wanted = REFERENCE.linear(matrix, rounded(x, scheme), bias)
    x, bias = x.to(device), bias.to(device)
    whole = KERNELS.linear(there, x, bias)
    checks.close(f"{name}, 300 rows", whole, wanted, 1e-4)
    for rows in (1, 2, 7, 16, 17, 60):
        checks.equal(f"{name}, {rows} of them alone", KERNELS.linear(there, x[:rows], bias), whole[:rows])
    x = x.bfloat16()
    wanted = REFERENCE.linear(matrix, rounded(x.cpu(), scheme))
    for rows in (9, 300):
        checks.close(f"{name}, {rows} rows of bfloat16", KERNELS.linear(there, x[:rows]), wanted[:rows], 1e-2)


def check_experts(checks: Checks, device: torch.device) -> None:
    experts, tokens, (width, hidden) = 12, 200, CHECK_EXPERT
    coded = (("trellis", 3), ("int", 5), ("table", 4), ("int", 1), ("trellis", 2))
    mixes = ([("int", 3)], [("int", width) for width in MIX], coded, [("int", 16), ("int", 4), ("table", 2)])
    for activation, mix in zip(ACTIVATIONS, mixes, strict=True):
        schemes = [
            Scheme(encoding=encoding, width=width, group_size=(32, 64, 128)[n % 3])
            for n, (encoding, width) in enumerate(mix)
        ]
        parts = [
            [random_matrix(shape, schemes[e % len(schemes)], torch.device("cpu")) for e in range(experts)]
            for shape in ((width, hidden), (width, hidden), (hidden, width))
        ]
        biases = [torch.randn(experts, size) for size in (width, width, hidden)]
        # one past the last expert means none
        index = torch.stack([torch.randperm(experts + 1)[:4] for _ in range(tokens)])
        x, weights = torch.randn(tokens, hidden), torch.rand(tokens, 4)
        wanted = expected_experts(ExpertStack(*parts, activation, *biases), x, index, weights)
        there = [[moved(matrix, device) for matrix in part] for part in parts]
        stack = ExpertStack(*there, activation, *(bias.to(device) for bias in biases))
        arguments = x.to(device), index.to(device), weights.to(device)
        whole = KERNELS.experts(stack, *arguments)
        name = f"experts of {'/'.join(f'{encoding} {width}' for encoding, width in mix)}, {activation}"
        # activations between the products may round the other way, here and there
        checks.close(f"{name}, {tokens} tokens", whole, wanted, 5e-3)
        for count in (1, 5, 40):
            few = KERNELS.experts(stack, *(argument[:count] for argument in arguments))
            checks.equal(f"{name}, {count} of them alone", few, whole[:count])
        checks.print_count(name)


def check_waiting(checks: Checks, device: torch.device) -> None:
    """A graph cannot be recorded of calls that wait for the GPU, and must repeat what they compute."""
    scheme, (width, hidden) = Scheme(width=3), CHECK_EXPERT
    parts = [
        [random_matrix(s, scheme, device) for _ in range(4)]
        for s in ((width, hidden), (width, hidden), (hidden, width))
    ]
    stack = ExpertStack(*parts, "silu")
    for tokens in (1, 100):
        index, x = torch.randint(4, (tokens, 2), device=device), torch.randn(tokens, hidden, device=device)
        call = partial(KERNELS.experts, stack, x, index, torch.rand(tokens, 2, device=device))
        wanted, found = call(), []
        torch.cuda.synchronize()
        try:
            graph = recorded(lambda call=call, found=found: found.append(call()))
        except RuntimeError as error:
            checks.true(f"experts in a CUDA graph, {tokens} tokens", False, str(error))
            continue
        graph.replay()
        torch.cuda.synchronize()
        checks.equal(f"experts in a CUDA graph, {tokens} tokens", found[0], wanted)
    checks.print_count("CUDA graphs")


# ---- how fast is it?


def recorded(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what it launches; an error if it waits for the GPU."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def milliseconds(calls: list[Callable[[], Any]], graph: bool, repeats: int = 20) -> float:
    """Median time of one of the calls, which come one after the other; a graph leaves out Python's part."""

    def run() -> None:
        for call in calls:
            call()

    # compiles and prepares everything, before anything is recorded
    run()
    torch.cuda.synchronize()
    start = recorded(run).replay if graph else run
    for _ in range(3):
        start()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        start()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / len(calls))
    return statistics.median(times)


def compared(name: str, ours: list[Callable[[], Any]], theirs: list[Callable[[], Any]]) -> dict[str, Any]:
    """Times of both in one run, in a graph and with Python's part, and their ratios."""
    line: dict[str, Any] = {"what": name}
    for way, graph in (("graph", True), ("python", False)):
        ms, bf16 = milliseconds(ours, graph), milliseconds(theirs, graph)
        line |= {f"{way}_ms": ms, f"{way}_bf16_ms": bf16, f"{way}_speedup": bf16 / ms}
    print(
        f"  {name:48} {line['graph_ms'] * 1e3:8.1f} us, bf16 {line['graph_bf16_ms'] * 1e3:8.1f} us:"
        f" {line['graph_speedup']:5.2f} x  (with Python's part {line['python_speedup']:5.2f} x)", flush=True,
    )  # fmt: skip
    return line


def copies(size: int) -> int:
    """How many matrices of that many bytes take turns, so that none is in the cache when its turn comes."""
    return max(2, min(64, COLD_BYTES // size))


def time_linear(device: torch.device) -> list[dict[str, Any]]:
    out, features = SHAPE
    dense = [
        torch.randn(SHAPE, device=device, dtype=torch.bfloat16) * features**-0.5
        for _ in range(copies(2 * out * features))
    ]
    lines = []
    kinds = (*(("int", width) for width in (2, 3, 4, 8, 16)), ("trellis", 2), ("trellis", 3), ("table", 4))
    for encoding, width in kinds:
        scheme = Scheme(width=width, encoding=encoding)
        size = scheme.stored_bytes(SHAPE)
        matrices = [random_matrix(SHAPE, scheme, device) for _ in range(copies(size))]
        for rows in ROWS:
            x = torch.randn(rows, features, device=device, dtype=torch.bfloat16)
            line = compared(
                f"linear {out} x {features}, {encoding} {width}, {rows} rows",
                [partial(KERNELS.linear, matrix, x) for matrix in matrices],
                [partial(linear, x, weight) for weight in dense],
            )
            lines.append(
                line
                | {
                    "encoding": encoding,
                    "width": width,
                    "rows": rows,
                    "weights_gb_per_s": size / line["graph_ms"] / 1e6,
                }
            )
    return lines


@contextmanager
def threshold(name: str, value: int) -> Iterator[None]:
    before = getattr(launcher, name)
    setattr(launcher, name, value)
    try:
        yield
    finally:
        setattr(launcher, name, before)


def time_threshold(device: torch.device) -> list[dict[str, Any]]:
    """Both ways to multiply where one takes over from the other: what `FEW_ROWS` should be."""
    lines = []
    for width, rows in product((3, 4), (2, 4, 8, 16, 32)):
        scheme = Scheme(width=width)
        matrices = [random_matrix(SHAPE, scheme, device) for _ in range(copies(scheme.stored_bytes(SHAPE)))]
        x = torch.randn(rows, SHAPE[1], device=device, dtype=torch.bfloat16)
        times = {}
        for way, few in (("registers", 64), ("tensor_cores", 0)):
            with threshold("FEW_ROWS", few):
                times[way] = milliseconds([partial(KERNELS.linear, m, x) for m in matrices], graph=True)
        lines.append({"width": width, "rows": rows, **times})
        print(
            f"  width {width}, {rows:2} rows: in registers {times['registers'] * 1e3:7.1f} us, "
            f"by tensor cores {times['tensor_cores'] * 1e3:7.1f} us", flush=True,
        )  # fmt: skip
    return lines


def bf16_loop(weights: tuple[Tensor, Tensor, Tensor], x: Tensor, shares: list[tuple[int, Tensor, Tensor]]) -> Tensor:
    """The experts of a layer one after the other; which tokens each gets, and with what weight, is given."""
    gate, up, down = weights
    total = torch.zeros_like(x)
    for expert, tokens, share in shares:
        found = x[tokens]
        out = linear(silu(linear(found, gate[expert])) * linear(found, up[expert]), down[expert])
        total.index_add_(0, tokens, out * share)
    return total


def time_experts(device: torch.device) -> list[dict[str, Any]]:
    def part(shape: tuple[int, int], shift: int) -> list[PackedMatrix]:
        return [random_matrix(shape, Scheme(width=MIX[(e + shift) % len(MIX)]), device) for e in range(EXPERTS)]

    def bf16(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16) * shape[-1] ** -0.5

    stacks = [
        ExpertStack(part((WIDTH, HIDDEN), n), part((WIDTH, HIDDEN), n), part((HIDDEN, WIDTH), n), "silu")
        for n in range(4)
    ]
    dense = [(bf16(EXPERTS, WIDTH, HIDDEN), bf16(EXPERTS, WIDTH, HIDDEN), bf16(EXPERTS, HIDDEN, WIDTH)) for _ in "12"]
    lines = []
    for tokens in TOKENS:
        x = torch.randn(tokens, HIDDEN, device=device, dtype=torch.bfloat16)
        ours: list[Callable[[], Any]] = []
        theirs: list[Callable[[], Any]] = []
        # other experts in each call, so that their weights are not in the cache
        for n in range(16):
            weights, index = torch.randn(tokens, EXPERTS, device=device).softmax(-1).topk(TOP_K, dim=-1)
            ours.append(partial(KERNELS.experts, stacks[n % len(stacks)], x, index, weights))
            shares = []
            for expert in index.unique().tolist():
                where, places = (index == expert).nonzero(as_tuple=True)
                shares.append((expert, where, weights[where, places, None].bfloat16()))
            theirs.append(partial(bf16_loop, dense[n % len(dense)], x, shares))
        name = f"experts {EXPERTS} top {TOP_K}, widths {'/'.join(map(str, MIX))}, {tokens} tokens"
        lines.append(compared(name, ours, theirs) | {"tokens": tokens})
    return lines


def main() -> int:
    device = torch.device("cuda")
    reason = KERNELS.unusable(device)
    if reason is not None:
        print(f"No GPU to run on: {reason}. Nothing was measured.", file=sys.stderr)
        return 2
    import triton

    torch.manual_seed(0)
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print(f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}\n\nIs it right?", flush=True)
    checks = Checks()
    check_linear(checks, device)
    check_experts(checks, device)
    check_waiting(checks, device)
    wrong = [line["check"] for line in checks.lines if not line["right"]]
    print(f"\n{len(wrong)} of {len(checks.lines)} checks are wrong.\n\nHow fast is it?", flush=True)
    result = machine | {"right": not wrong, "checks": checks.lines}
    file = ROOT / "runs" / "gpu" / "gpu.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    for name, measure in (("linear", time_linear), ("experts", time_experts), ("few_rows", time_threshold)):
        result[name] = measure(device)
        file.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nWritten to {file}.")
    for name in wrong:
        print(f"WRONG: {name}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
