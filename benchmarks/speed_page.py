"""docs/results/speed.md from what `make bench` measured."""

import json
from pathlib import Path

from kernel_speed import LLAMA_FORMS

ROOT = Path(__file__).parents[1]
RUNS, PAGE = ROOT / "runs" / "bench", ROOT / "docs" / "results" / "speed.md"


def processor() -> str:
    """The instructions that decide about the speed."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return next(
        (name for flag, name in (("avx512_vnni", "AVX-512 VNNI"), ("avx2", "AVX2")) if flag in flags), "neither"
    )


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" + "---:|" * (len(headings) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def linear_table(rows: list[dict], threads: int, count: int) -> str:
    chosen = [r for r in rows if (r["op"], r["threads"], r["rows"]) == ("linear", threads, count)]
    return table(
        ["encoding, width", "us", "of read bandwidth", "vs torch bf16", "vs ONNX Runtime"],
        [
            [r["width"], f"{r['microseconds']:.0f}", ratio(r["bandwidth_fraction"]), ratio(r["vs_bf16"]),
             ratio(r["vs_onnxruntime"])]
            for r in chosen
        ],
    )  # fmt: skip


def llama_table(rows: list[dict]) -> str:
    return table(
        ["encoding, width", "type of llama.cpp", "theirs / ours"],
        [
            [r["width"], LLAMA_FORMS[r["width"]], ratio(r["vs_llama_cpp"])]
            for r in rows if r.get("vs_llama_cpp")
        ],
    )  # fmt: skip


def path_table(rows: list[dict]) -> str:
    found = [r for r in rows if r["op"] == "path"]
    paths, forms = (list(dict.fromkeys(r[key] for r in found)) for key in ("path", "width"))
    cells = {
        (r["width"], r["path"]): f"{r['microseconds']:.0f} ({ratio(r['bandwidth_fraction'])})" for r in found
    }  # fmt: skip
    return table(["encoding, width", *paths], [[form, *(cells[form, path] for path in paths)] for form in forms])


def experts_table(rows: list[dict]) -> str:
    return table(
        ["tokens, threads", "us", "of read bandwidth", "vs transformers bf16", "vs separate linears"],
        [
            [f"{r['rows']}, {r['threads']}", f"{r['microseconds']:.0f}", ratio(r["bandwidth_fraction"]),
             f"{ratio(r['vs_bf16'])} ({r['bf16'].split()[-1]})", ratio(r["vs_separate"])]
            for r in rows if r["op"] == "experts"
        ],
    )  # fmt: skip


def model_table(rows: list[dict], threads: int) -> str:
    return table(
        ["engine, weights", "MB", "decode tok/s", "prefill tok/s", "load s", "peak MB"],
        [
            [f"{r['engine']}, {r['weights']}", f"{r['bytes'] / 1e6:.0f}", f"{r['decode_tokens_per_second']:.0f}",
             f"{r['prefill_tokens_per_second']:.0f}", f"{r['load_seconds']:.2f}", f"{r['peak_bytes'] / 1e6:.0f}"]
            for r in rows if r["threads"] == threads
        ],
    )  # fmt: skip


def accuracy_table(rows: list[dict]) -> str:
    return table(
        ["text", "perplexity, reference", "native", "change", "KL, reference", "native"],
        [
            [r["distribution"], f"{r['perplexity_reference']:.3f}", f"{r['perplexity_native']:.3f}",
             f"{r['perplexity_change_percent']:+.3f} %", f"{r['kl_reference']:.5f}", f"{r['kl_native']:.5f}"]
            for r in rows
        ],
    )  # fmt: skip


def main() -> None:
    kernels, model, accuracy = (
        json.loads((RUNS / f"{name}.json").read_text()) for name in ("kernels", "model", "accuracy")
    )
    bandwidth = max(r["read_gigabytes_per_second"] for r in kernels if r.get("read_gigabytes_per_second"))
    PAGE.write_text(f"""# Speed

Command: `make bench` (`benchmarks/kernel_speed.py`, `model_speed.py`, `kernel_accuracy.py`), then
`benchmarks/speed_page.py`. Ratios are theirs / ours, above 1 is faster, medians from one run in which the contenders
took turns. One machine with {processor()} and 2 cores, which read memory at up to {bandwidth:.0f} GB/s.

## Linear, 2048 -> 5632, groups of 64, weights larger than the cache
ONNX Runtime is `MatMulNBits` at accuracy level 4 (8-bit activations as here); it has no other widths.

One row, one thread:

{linear_table(kernels, 1, 1)}

One row, two threads:

{linear_table(kernels, 2, 1)}

llama.cpp's kernels for its types with as many bits, one row, one thread (random codes; `benchmarks/ggml_product.py`):

{llama_table(kernels)}

The code for each set of instructions, one row, one thread, in us (and of the read bandwidth):

{path_table(kernels)}

Four rows, one thread:

{linear_table(kernels, 1, 4)}

256 rows, one thread:

{linear_table(kernels, 1, 256)}

256 rows, two threads:

{linear_table(kernels, 2, 256)}

## Experts: 64 experts, top 8, 2048 -> 1024, widths 2, 3, 4 and 8 by turns
Transformers runs the fastest of its own implementations (named) in bfloat16; separate linears are the same kernels, one
call per matrix.

{experts_table(kernels)}

## A whole model
Random Qwen3 Mixture-of-Experts, 441 M parameters: 8 layers, 32 experts of which 4 work on a token, hidden size 1024.
A prompt of 128 tokens, then 64 more. moqa's mixed checkpoint has 2.5 stored bits per weight, experts of 1 to 4 bits
side by side; `trellis-2` has 2 bits of a trellis everywhere. llama.cpp is compiled for this machine; it reorders
weights when it loads (repacked) or not: one is better for decoding, the other for prefill. Embedding and head stay
16-bit in all. Peak memory of moqa and transformers includes Python with torch (about 450 MB). moqa decodes about as
fast as the memory is read, so its speed follows that of the memory, which on a shared machine changes by the hour; that
of llama.cpp's kernels follows the processor.

One thread:

{model_table(model, 1)}

Two threads:

{model_table(model, 2)}

## What 8-bit activations cost
Reference model at 3 bits, 64 windows of each held-out text.

{accuracy_table(accuracy)}
""")


if __name__ == "__main__":
    main()
