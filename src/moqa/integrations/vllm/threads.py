"""Where the native kernels' threads run: vLLM binds each of its own to one core, and new ones would share that."""

import os
import re
from functools import cache

import torch

from moqa.kernels import native

# how vLLM tells OpenMP the cores of a process
_LISTS = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES")


@cache
def use_all_cores(device: torch.device) -> None:
    """Start the native kernels' threads on the cores that vLLM gave this process, and not all on that of the caller.

    >>> use_all_cores(torch.device("cpu"))
    """
    cores = {int(core) for name in _LISTS for core in re.findall(r"\d+", os.environ.get(name, ""))}
    if device.type != "cpu" or not cores or torch.get_num_threads() == 1:
        return
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cores)
        # threads are started by the first product that has work for them
        native.read(torch.empty(2**22 * torch.get_num_threads(), dtype=torch.uint8))
    finally:
        os.sched_setaffinity(0, before)
