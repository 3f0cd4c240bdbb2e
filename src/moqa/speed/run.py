"""`moqa.bench`: load time, prefill and decode speed, and memory; every model is measured in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from pydantic import BaseModel, Field

from moqa.errors import MoqaError
from moqa.originals.folder import locate

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class Speed(BaseModel, frozen=True):
    """Measured speed and memory; speeds are the median of several repeats."""

    model: str
    engine: str = Field(description="moqa for a checkpoint, transformers for an original model")
    kernels: str | None = Field(description="kernels that a checkpoint computed with")
    threads: int
    prompt_tokens: int
    new_tokens: int
    bytes: int = Field(description="bytes of the weight files")
    load_seconds: float = Field(description="from files in the page cache to a model that can run")
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_bytes: int = Field(description="peak resident memory, including mapped weights and Python itself")


def bench(
    model: str | Path,
    *,
    threads: int | None = None,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    repeats: int = 5,
    kernels: str = "auto",
) -> Speed:
    """Measure a model in a fresh process: it reads random tokens at once, then writes more one by one.

    >>> moqa.bench("runs/out").decode_tokens_per_second  # doctest: +SKIP

    Args:
        model: folder of a checkpoint, or folder or Hub id of an original, which runs in transformers in bfloat16.
        threads: threads of each operation; None means all cores.
        prompt_tokens: tokens to read at once.
        new_tokens: tokens to write after them.
        repeats: measurements of both, after one that is not counted.
        kernels: kernels for a checkpoint, see `moqa.load`.

    Raises:
        MoqaError: if the model is missing or damaged, or its context is too short for the tokens.
    """
    threads = threads or len(os.sched_getaffinity(0))
    folder = locate(model)
    environment = os.environ | dict.fromkeys(THREADS, str(threads)) | {"HF_HUB_OFFLINE": "1"}
    options = {
        "folder": str(folder), "threads": threads, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens,
        "repeats": repeats, "kernels": kernels,
    }  # fmt: skip
    command = [sys.executable, "-m", "moqa.speed.worker", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == 2:
        raise MoqaError(done.stderr.strip().splitlines()[-1].removeprefix("moqa: "))
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return Speed(model=str(model), **json.loads(done.stdout.splitlines()[-1]))
