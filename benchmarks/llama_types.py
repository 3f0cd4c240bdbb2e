"""llama.cpp's types for benchmarks/low_bits_rows.py: made by its own tool, decoded by `gguf`, measured by moqa.

The tool gets an importance matrix of moqa's calibration windows. Where the rows of a matrix are no multiple of the 256
weights that most types quantize together, it falls back to 4 bits and more; it is then given several rows as one, which
no engine of llama.cpp reads, but which is what these types make of the weights. Embedding and head keep 16 bits.
"""

import shutil
import subprocess
from collections.abc import Iterator
from math import gcd
from pathlib import Path

import numpy as np
import torch
from demo import KNOWN, ROOT, texts
from gguf_engine import NAMES
from low_bits_rows import CONTEXT, Model, quality
from torch import Tensor

from moqa.data import cut_windows

QUANTIZE = ROOT / ".peers" / "llama.cpp" / "build" / "bin" / "llama-quantize"
ATTENTION = "attq5"
SUPERBLOCK = 256
# the matrices of a dense layer, which `NAMES` does not have
DENSE = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def llama_row(model: Model, kind: str, setting: str, original: Path) -> dict:
    """A type of llama.cpp, from the original as a GGUF file in bfloat16."""
    made = model.runs / f"{setting.replace(' ', '-')}.gguf"
    if not made.exists():
        part = made.with_suffix(".part")
        command = [QUANTIZE, "--imatrix", importance(model), "--token-embedding-type", "bf16"]
        command += ["--output-tensor-type", "bf16"]  # of a tied head
        if setting.endswith(ATTENTION):
            for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
                command += ["--tensor-type", f"{name}=q5_k"]
        with (model.runs / "llama-quantize.log").open("w") as log:
            subprocess.run([*command, original, part, kind], check=True, stdout=log, stderr=log)
        part.rename(made)
    size, weights = decode(model, made)
    return quality(model, model.runs / "decoded", size, weights)


def rows_as_one(inputs: int) -> int:
    """Rows of so many weights that make up whole blocks of 256."""
    return SUPERBLOCK // gcd(SUPERBLOCK, inputs)


def importance(model: Model) -> Path:
    """llama.cpp's importance matrix: for every matrix the sum of squares of each input, and the number of tokens."""
    from gguf import GGUFWriter

    made = model.runs / "importance.gguf"
    if made.exists():
        return made
    part = made.with_suffix(".part")
    writer = GGUFWriter(part, "")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", list(KNOWN))
    writer.add_uint32("imatrix.chunk_count", model.samples * len(KNOWN))
    writer.add_uint32("imatrix.chunk_size", CONTEXT)
    for name, (squares, counts) in input_squares(model).items():
        writer.add_tensor(f"{name}.weight.in_sum2", squares.tile(1, rows_as_one(squares.shape[1])).numpy())
        writer.add_tensor(f"{name}.weight.counts", counts[:, None].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(made)
    return made


@torch.no_grad()
def input_squares(model: Model) -> dict[str, tuple[Tensor, Tensor]]:
    """llama.cpp's name of a matrix -> [matrices, in] sums of squared inputs and [matrices] tokens, float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    tokenizer, found = AutoTokenizer.from_pretrained(model.folder), dict[str, tuple[Tensor, Tensor]]()

    def add(name: str, row: int, of: int, x: Tensor) -> None:
        squares, counts = found.setdefault(name, (torch.zeros(of, x.shape[-1]), torch.zeros(of)))
        squares[row] += x.square().sum(0)
        counts[row] += len(x)

    def watch(layer: int, block: torch.nn.Module) -> None:
        for ours, theirs in (NAMES | DENSE).items():
            if ours.endswith("_proj") and ours in dict(block.named_modules()):
                block.get_submodule(ours).register_forward_pre_hook(
                    lambda _, args, name=f"blk.{layer}.{theirs}": add(name, 0, 1, args[0].flatten(0, -2))
                )
        experts = getattr(block.mlp, "experts", None)

        def routed(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            hidden, index = args[0], args[1]
            for expert in range(experts.num_experts):
                x = hidden[(index == expert).any(-1)]
                gate, up = torch.nn.functional.linear(x, experts.gate_up_proj[expert]).chunk(2, -1)
                for role, seen in (("gate", x), ("up", x), ("down", experts.act_fn(gate) * up)):
                    add(f"blk.{layer}.ffn_{role}_exps", expert, experts.num_experts, seen)

        if experts is not None:
            experts.register_forward_pre_hook(routed)

    for layer, block in enumerate(loaded.model.layers):
        watch(layer, block)
    for distribution in texts("calib", KNOWN):
        for window in cut_windows(distribution, tokenizer, CONTEXT, model.samples, seed=0).inputs.split(8):
            loaded.model(window)
    return found


def decode(model: Model, made: Path) -> tuple[int, int]:
    """Write the weights of a GGUF file as a folder that moqa evaluates; returns bytes and weights of all layers."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import load_file, save_file

    folder = model.runs / "decoded"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model.folder, folder)
    weights = {name: tensor.float() for name, tensor in load_file(model.folder / "model.safetensors").items()}
    size = count = 0
    for tensor in GGUFReader(made).tensors:
        parts = tensor.name.split(".")
        if parts[0] != "blk" or "norm" in parts[2] or parts[2] == "ffn_gate_inp":
            continue
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        size, count = size + int(tensor.n_bytes), count + values.numel()
        for name, matrix in _named(f"model.layers.{parts[1]}", parts[2], values):
            weights[name] = matrix.reshape(weights[name].shape)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return size, count


def _named(layer: str, name: str, values: Tensor) -> Iterator[tuple[str, Tensor]]:
    ours = {theirs: ours for ours, theirs in (NAMES | DENSE).items()}
    if name in ours:
        yield f"{layer}.{ours[name]}.weight", values.contiguous()
        return
    role = name.split("_")[1]
    for expert, matrix in enumerate(values):
        yield f"{layer}.mlp.experts.{expert}.{role}_proj.weight", matrix.contiguous()
