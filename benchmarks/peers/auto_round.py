"""AutoRound: signed gradient descent on the rounding and the ranges of a layer, with its own defaults."""

from collections.abc import Iterator
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(job: dict) -> None:
    windows = torch.tensor(job["windows"])
    AutoRound(
        AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto"),
        AutoTokenizer.from_pretrained(job["model"]),
        bits=job["bits"],
        group_size=job["group_size"],
        sym=job["symmetric"],
        iters=job["iterations"],
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=job["batch"],
        device_map="cpu",
        dataset=[{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows[:, None]],
    ).quantize_and_save(job["out"], format="fake")  # decoded weights in a plain checkpoint


def dense(job: dict) -> Iterator[tuple[str, Tensor]]:
    for file in Path(job["out"]).rglob("*.safetensors"):
        yield from load_file(file).items()
