"""Quality from 1.4 to 4.3 bits: moqa's default plans at the bytes of llama.cpp's types, on the reference model.

llama.cpp quantizes with its own tool and an importance matrix of the same calibration windows; token embedding and head
keep 16 bits. Its weights are decoded by `gguf` and measured by moqa's evaluator. Writes runs/low-bits/summary.json and
docs/results/low-bits.md; rows that are there are kept, so that a run that was stopped goes on.

Then, at 2, 2.5 and 3 bits, each of the parts that the default plan is made of: alone, added to what there was before
all of them (integers in groups of 64, floors of 4 bits, a hedge of 0.3, gptq without gradients at outputs), and all
together.
"""

import argparse
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from demo import KNOWN, MODEL, NOVEL, texts
from gguf_engine import NAMES, prepare
from low_bits_page import write
from torch import Tensor

import moqa
from moqa.data import cut_windows
from moqa.evaluation import Evaluation
from moqa.profiling import Profile, read_profile

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "low-bits"
SUMMARY = RUNS / "summary.json"
QUANTIZE = ROOT / ".peers" / "llama.cpp" / "build" / "bin" / "llama-quantize"
TYPES = ("IQ1_M", "IQ2_XXS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_S", "Q3_K_M", "IQ4_XS")
ATTENTION = "attq5"
PART_BUDGETS = (2.0, 2.5, 3.0)
EARLIER: dict[str, Any] = {
    "encodings": ("int",), "groups": (64,), "widths": (2, 3, 4, 5, 6, 8), "hedge": 0.3,
    "floors": {"shared": 4, "attention": 4, "mlp": 4},
}  # fmt: skip
# what is changed
PARTS: dict[str, dict[str, Any]] = {
    "before": {},
    "no floors": {"floors": {}},
    "groups of 32 to 256": {"groups": None},
    "table": {"encodings": ("int", "table"), "widths": (1, 2, 3, 4, 5, 6, 8)},
    "trellis": {"encodings": ("int", "trellis"), "widths": (1, 2, 3, 4, 5, 6, 8)},
    "hedge of the size": {"hedge": None},
    "gradients at outputs": {"gradients": True},
    "together without gradients": {"gradients": False},
    "together": {},
}
CONTEXT = 256


def main() -> None:
    """Measure what is not measured yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--windows", type=int, default=64, help="held-out windows of 256 tokens per text")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows per known text")
    options = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    for kind in options.types:
        for setting in (kind, f"{kind} {ATTENTION}"):
            if not _known(tool="llama.cpp", setting=setting):
                _keep(llama_row(kind, setting, options))
            bits = _known(tool="llama.cpp", setting=setting)[0]["bits_per_weight"]
            for seed in options.seeds:
                if not _known(tool="moqa", setting=setting, seed=seed):
                    _keep(moqa_row(setting, bits, seed, options))
            write(_known())
    for bits in PART_BUDGETS:
        for part in PARTS:
            if not _known(setting=f"{bits:g} bits, {part}"):
                _keep(part_row(part, bits, options))
                write(_known())


def _known(**wanted: object) -> list[dict]:
    rows = json.loads(SUMMARY.read_text())["rows"] if SUMMARY.exists() else []
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _keep(row: dict) -> None:
    print(json.dumps(row), flush=True)
    SUMMARY.write_text(json.dumps({"rows": [*_known(), row]}, indent=1) + "\n")


def _row(tool: str, setting: str, seed: int, size: int, weights: int, found: Evaluation) -> dict:
    kl = {name: quality.kl_divergence for name, quality in found.distributions.items()}
    top = {name: quality.top1_agreement for name, quality in found.distributions.items()}
    return {
        "model": "reference", "tool": tool, "setting": setting, "seed": seed, "bytes": size,
        "bits_per_weight": size * 8 / weights, "kl_known": mean(kl[name] for name in KNOWN),
        "kl_novel": mean(kl[name] for name in NOVEL), "top1_known": mean(top[name] for name in KNOWN),
    }  # fmt: skip


# --- moqa --------------------------------------------------------------------------------------------------------


@cache
def profile_of(seed: int, samples: int) -> Profile:
    """The profile of the known texts whose windows are drawn with a seed."""
    folder = RUNS / f"profile-{seed}"
    if not (folder / "profile.json").exists():
        moqa.profile(MODEL, texts("calib", KNOWN), folder, samples=samples, seed=seed)
    return read_profile(folder)


def moqa_row(setting: str, bits: float, seed: int, options: argparse.Namespace) -> dict:
    """The default plan of so many bits, quantized and measured from its packed files."""
    profile = profile_of(seed, options.samples)
    return _measured(setting, seed, profile, moqa.plan(profile, f"{bits}bpw"), options)


def part_row(part: str, bits: float, options: argparse.Namespace) -> dict:
    """The same with one of the parts alone; without figures if no plan is so small."""
    changes = dict(PARTS[part])
    profile, setting = profile_of(options.seeds[0], options.samples), f"{bits:g} bits, {part}"
    if not changes.pop("gradients", part.startswith("together")):
        profile = replace(profile, statistics={
            name: {key: table for key, table in tables.items() if ".gradient_" not in key}
            for name, tables in profile.statistics.items()
        })  # fmt: skip
    try:
        plan = moqa.plan(profile, f"{bits}bpw", **({} if part.startswith("together") else EARLIER | changes))
    except moqa.MoqaError as error:
        print(f"{setting}: {error}", flush=True)
        nothing = dict.fromkeys(("bytes", "bits_per_weight", "kl_known", "kl_novel", "top1_known"))
        return {"model": "reference", "tool": "moqa", "setting": setting, "seed": options.seeds[0], **nothing}
    return _measured(setting, options.seeds[0], profile, plan, options)


def _measured(setting: str, seed: int, profile: Profile, plan: moqa.Plan, options: argparse.Namespace) -> dict:
    out = RUNS / "out"
    moqa.quantize(MODEL, plan, out, profile=profile, overwrite=True, restart=True)
    found = moqa.evaluate(out, texts("test", (*KNOWN, *NOVEL)), against=MODEL, windows=options.windows)
    return _row("moqa", setting, seed, plan.account.units, plan.account.weights, found)


# --- llama.cpp ---------------------------------------------------------------------------------------------------


def llama_row(kind: str, setting: str, options: argparse.Namespace) -> dict:
    """A type of llama.cpp, quantized by its own tool, decoded and measured."""
    made, folder = RUNS / f"{setting.replace(' ', '-')}.gguf", RUNS / "decoded"
    if not made.exists():
        part = made.with_suffix(".part")
        command = [QUANTIZE, "--imatrix", importance(options.samples), "--token-embedding-type", "bf16"]
        if setting.endswith(ATTENTION):
            for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
                command += ["--tensor-type", f"{name}=q5_k"]
        with (RUNS / "llama-quantize.log").open("w") as log:
            subprocess.run([*command, _original(), part, kind], check=True, stdout=log, stderr=log)
        part.rename(made)
    size, weights = decode(made, folder)
    found = moqa.evaluate(folder, texts("test", (*KNOWN, *NOVEL)), against=MODEL, windows=options.windows)
    return _row("llama.cpp", setting, 0, size, weights, found)


@cache
def _original() -> Path:
    """The reference model as a GGUF file in bfloat16."""
    copy = RUNS / "reference"
    if not copy.exists():
        shutil.copytree(MODEL, copy)
    return prepare(copy, "BF16")


@cache
def importance(samples: int) -> Path:
    """llama.cpp's importance matrix: for every matrix the sum of squares of each input, and the number of tokens."""
    from gguf import GGUFWriter

    made = RUNS / "importance.gguf"
    writer = GGUFWriter(made, "")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", list(KNOWN))
    writer.add_uint32("imatrix.chunk_count", samples * len(KNOWN))
    writer.add_uint32("imatrix.chunk_size", CONTEXT)
    for name, (squares, counts) in input_squares(samples).items():
        writer.add_tensor(f"{name}.weight.in_sum2", squares.numpy())
        writer.add_tensor(f"{name}.weight.counts", counts[:, None].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


@torch.no_grad()
def input_squares(samples: int) -> dict[str, tuple[Tensor, Tensor]]:
    """llama.cpp's name of a matrix -> [matrices, in] sums of squared inputs and [matrices] tokens, float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer, found = AutoTokenizer.from_pretrained(MODEL), dict[str, tuple[Tensor, Tensor]]()

    def add(name: str, row: int, of: int, x: Tensor) -> None:
        squares, counts = found.setdefault(name, (torch.zeros(of, x.shape[-1]), torch.zeros(of)))
        squares[row] += x.square().sum(0)
        counts[row] += len(x)

    def watch(layer: int, block: torch.nn.Module) -> None:
        for ours, theirs in NAMES.items():
            if ours.startswith("self_attn.") and ours.endswith("_proj"):
                module = block.get_submodule(ours)
                module.register_forward_pre_hook(
                    lambda _, args, name=f"blk.{layer}.{theirs}": add(name, 0, 1, args[0].flatten(0, -2))
                )
        experts = block.mlp.experts

        def routed(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            hidden, index = args[0], args[1]
            for expert in range(experts.num_experts):
                x = hidden[(index == expert).any(-1)]
                gate, up = torch.nn.functional.linear(x, experts.gate_up_proj[expert]).chunk(2, -1)
                for role, seen in (("gate", x), ("up", x), ("down", experts.act_fn(gate) * up)):
                    add(f"blk.{layer}.ffn_{role}_exps", expert, experts.num_experts, seen)

        experts.register_forward_pre_hook(routed)

    for layer, block in enumerate(model.model.layers):
        watch(layer, block)
    for distribution in texts("calib", KNOWN):
        for window in cut_windows(distribution, tokenizer, CONTEXT, samples, seed=0).inputs.split(8):
            model(window)
    return found


def decode(made: Path, folder: Path) -> tuple[int, int]:
    """Write the weights of a GGUF file as a folder that moqa evaluates; returns bytes and weights of all layers."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import load_file, save_file

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(MODEL, folder)
    weights = {name: tensor.float() for name, tensor in load_file(MODEL / "model.safetensors").items()}
    theirs = {value: key for key, value in NAMES.items()}
    size = count = 0
    for tensor in GGUFReader(made).tensors:
        parts = tensor.name.split(".")
        if parts[0] != "blk" or "norm" in parts[2] or parts[2] == "ffn_gate_inp":
            continue
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        size, count = size + int(tensor.n_bytes), count + values.numel()
        weights |= dict(_named(f"model.layers.{parts[1]}", parts[2], theirs, values))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return size, count


def _named(layer: str, name: str, theirs: dict[str, str], values: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name in theirs:
        yield f"{layer}.{theirs[name]}.weight", values.contiguous()
        return
    role = name.split("_")[1]
    for expert, matrix in enumerate(values):
        yield f"{layer}.mlp.experts.{expert}.{role}_proj.weight", matrix.contiguous()


if __name__ == "__main__":
    main()
