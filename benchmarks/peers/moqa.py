"""moqa: the uniform plan. Its profile is part of the job where it is not there yet."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401 - moqa does it late, the others at the start

import moqa
from moqa.format.reader import open_checkpoint
from moqa.kernels import PackedMatrix
from moqa.profiling import read_profile


def quantize(job: dict) -> None:
    if Path(job["profile"]).exists():
        profile = read_profile(job["profile"])
    else:
        windows = job["windows"]
        profile = moqa.profile(
            job["model"], {"wiki": job["text"]}, job["profile"], samples=len(windows), context=len(windows[0]),
            group_size=job["group_size"], symmetric=True, sensitivity=False,  # a uniform plan needs none
        )  # fmt: skip
    moqa.quantize(
        job["model"], moqa.plan(profile, None, strategy="uniform", widths=[job["bits"]]), job["out"], profile=profile
    )


def dense(job: dict) -> Iterator[tuple[str, Tensor]]:
    checkpoint = open_checkpoint(job["out"], verify=False)
    tensors = [checkpoint.layer(layer) for layer in range(checkpoint.manifest.layers)]
    for name, unit in checkpoint.manifest.units.items():
        stored = {suffix: tensors[unit.layer][f"{name}.{suffix}"] for suffix in unit.scheme.tensors(unit.shape)}
        yield f"{name}.weight", PackedMatrix(unit.scheme, unit.shape, stored).dense()
