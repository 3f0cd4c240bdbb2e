"""Milliseconds of a policy's call and the peak memory of a process that does nothing else: FOLDER THREADS."""

import json
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from moqa.memory.process import used
from moqa.policies.small import SmallPolicy
from moqa.vla.actor import Actor

WARM_UP, CALLS = 10, 300


def products(actor: Actor, act: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of each matrix product of a call, the fastest of some."""
    begin, fastest = dict[str, float](), dict[str, float]()

    def end(name: str) -> None:
        spent = 1000 * (time.perf_counter() - begin[name])
        fastest[name] = min(spent, fastest.get(name, spent))

    for name, module in actor.model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):  # packed ones are linear layers, too
            module.register_forward_pre_hook(lambda *_, name=name: begin.update({name: time.perf_counter()}))
            module.register_forward_hook(lambda *_, name=name: end(name))
    for _ in range(CALLS // 3):
        act()
    return fastest


def main() -> None:
    folder, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    assert SmallPolicy is not None  # transformers is imported by now, and does not count as the policy's memory
    before = used()[1]
    actor = Actor(folder)
    random = np.random.default_rng(0)
    image, state = random.integers(0, 256, (actor.size, actor.size, 3), np.uint8), np.zeros(4, np.float32)
    act = partial(actor.act, image, state, "open the drawer")
    for _ in range(WARM_UP):
        act()
    begin = time.process_time()
    for _ in range(CALLS):
        act()
    processor = 1000 * (time.process_time() - begin) / CALLS
    found, peak = actor.milliseconds[WARM_UP:], used()[1]
    each = products(actor, act)
    stem = sum(time for name, time in each.items() if ".stem." in name)
    print(json.dumps({
        # where the machine works for others too, most calls wait for it: the fastest did not
        "threads": threads, "milliseconds": min(found), "median": float(np.median(found)), "processor": processor,
        "products": len(each), "of_products": sum(each.values()), "of_convolutions": stem,
        "peak_bytes": peak, "above_start_bytes": peak - before,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
