"""llm-compressor: GPTQ over experts that are made linear layers when the model is loaded.

Its `load_quantizable_moe`, which would load them so, needs torchvision; `linearize_moe` after loading gives the same
layers, in a second.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(job: dict) -> None:
    model = linearize_moe(AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto"))
    recipe = GPTQModifier(
        config_groups={
            "experts": scheme(job, r"re:.*mlp\.experts.*", job["bits"]),
            "attention": scheme(job, r"re:.*self_attn.*_proj$", job["attention_bits"]),
        },
        ignore=["lm_head", r"re:.*mlp\.gate$"],
    )
    windows = job["windows"]
    samples = {"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]}
    oneshot(
        model=model, tokenizer=AutoTokenizer.from_pretrained(job["model"]), recipe=recipe,
        dataset=Dataset.from_dict(samples), num_calibration_samples=len(windows), max_seq_length=len(windows[0]),
        batch_size=job["batch"], moe_calibrate_all_experts=job["all_experts"],
    )  # fmt: skip
    model.save_pretrained(job["out"], save_compressed=True)


def scheme(job: dict, targets: str, bits: int) -> dict:
    weights = {"num_bits": bits, "strategy": "group", "group_size": job["group_size"], "symmetric": True}
    return {"targets": [targets], "weights": weights}


def dense(job: dict) -> Iterator[tuple[str, Tensor]]:
    files = Path(job["out"]).glob("*.safetensors")
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for name in stored:
        module, suffix = name.rsplit(".", 1)
        if suffix == "weight_packed":
            bits = job["bits" if ".experts." in module else "attention_bits"]
            integers = unpack_from_int32(stored[name], bits, torch.Size(stored[f"{module}.weight_shape"].tolist()))
            scale = stored[f"{module}.weight_scale"].float()
            yield f"{module}.weight", integers * scale.repeat_interleave(job["group_size"], 1)
