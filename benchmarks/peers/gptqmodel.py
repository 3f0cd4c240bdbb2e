"""GPTQModel: its own definition of the family has a linear layer for every matrix of an expert."""

import os
from collections.abc import Iterator

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # its lazy loader does not start with fewer; they share one core

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from torch import Tensor


def quantize(job: dict) -> None:
    config = QuantizeConfig(
        bits=job["bits"], group_size=job["group_size"], sym=True, device="cpu",
        dynamic={r".*self_attn.*": {"bits": job["attention_bits"]}},
    )  # fmt: skip
    model = GPTQModel.load(job["model"], config)
    samples = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in job["windows"]]
    model.quantize(samples, batch_size=job["batch"])
    model.save(job["out"])


def dense(job: dict) -> Iterator[tuple[str, Tensor]]:
    model = GPTQModel.load(job["out"], backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)  # that of its scales
    for name, module in model.model.named_modules():
        if hasattr(module, "dequantize_weight"):
            module.scales = module.scales.float()
            yield f"{name}.weight", module.dequantize_weight().T
