"""One stage of the scale study in a process of its own: `scale_stage.py JOB.json`.

Says how long each part of the work took, and what was resident at most, in all and in every decoder layer.
"""

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import moqa
import moqa.quantization.layer
import moqa.quantization.run
from moqa.calibration.inputs import BlockInputs
from moqa.estimate import estimate
from moqa.memory.limit import MemoryLimit
from moqa.memory.process import resident
from moqa.models.loader import BlockLoader
from moqa.profiling import read_profile
from moqa.quantization.samples import CalibrationSamples


class Watch:
    """Seconds of the parts of the work, each without the parts inside it, and resident memory by layer."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.peaks: Counter[int] = Counter()
        self.began: dict[int, float] = {}
        self.ended = 0.0
        self.layer = -1
        self._of_thread = threading.local()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self.peaks[self.layer] = max(self.peaks[self.layer], resident())
            time.sleep(0.01)

    def report(self, step: str, done: int, total: int, **facts: Any) -> None:
        """A layer begins, or the last one ends; sensitivity is not mistaken for what goes forwards."""
        if done == total and self.began and not self.ended:
            self.layer, self.ended = len(self.began), time.perf_counter()
        if "layer" in facts and step != "sensitivity" and facts["layer"] != self.layer:
            self.layer = facts["layer"]
            self.began[self.layer] = time.perf_counter()

    @property
    def _inside(self) -> list[float]:
        """Seconds of the parts inside each part that this thread is in."""
        if not hasattr(self._of_thread, "inside"):
            self._of_thread.inside = [0.0]
        return self._of_thread.inside

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        self._inside.append(0.0)
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self.seconds[name] += took - self._inside.pop()
            self._inside[-1] += took

    def over(self, owner: Any, name: str, part: str) -> None:
        """Count every call of a function as a part."""
        function: Callable = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.part(part):
                return function(*arguments, **options)

        setattr(owner, name, timed)


def foretold(job: dict) -> dict:
    """What a dry run says of gptq and rtn."""
    profile = read_profile(job["profile"])
    plan = moqa.plan(profile, None, strategy="uniform", widths=[job["bits"]])
    memory = MemoryLimit.parse(job["memory"])
    began = time.perf_counter()
    found = {
        name: estimate(job["model"], plan, profile, method=name, memory=memory).model_dump() for name in ("gptq", "rtn")
    }
    return found | {"seconds": time.perf_counter() - began}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    if job["stage"] == "dry run":
        Path(job["found"]).write_text(json.dumps(foretold(job)))
        return
    watch = Watch()
    watch.over(BlockLoader, "_read", "read")
    watch.over(BlockInputs, "__init__", "run the layer, sum attention's inputs")
    watch.over(BlockInputs, "experts", "sum experts' inputs")
    watch.over(moqa.quantization.run, "write_shard", "write")
    watch.over(CalibrationSamples, "advance", "run the quantized layer")
    solve = moqa.quantization.layer.solve

    def solved(*arguments: Any) -> Any:
        with watch.part("solve"):
            return list(solve(*arguments))

    moqa.quantization.layer.solve = solved
    memory = MemoryLimit.parse(job["memory"])
    began, used = time.perf_counter(), time.process_time()
    if job["stage"] == "profile":
        moqa.profile(
            job["model"], {"wiki": job["text"]}, job["profile"], samples=job["windows"], context=job["context"],
            self_samples=0, method="rtn", memory=memory, report=watch.report, sensitivity=False, restart=True,
        )  # fmt: skip
    else:
        profile = read_profile(job["profile"])
        plan = moqa.plan(profile, None, strategy="uniform", widths=[job["bits"]])
        moqa.quantize(
            job["model"], plan, job["out"], method=job["stage"], profile=profile, memory=memory, report=watch.report,
            overwrite=True, restart=True,
        )  # fmt: skip
    seconds = time.perf_counter() - began
    watch.seconds["all else"] = seconds - sum(watch.seconds.values())
    starts = [*watch.began.values(), watch.ended]
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    found = {
        "seconds": seconds, "cpu_seconds": time.process_time() - used, "peak_bytes": peak,
        "parts": dict(watch.seconds), "layer_peaks": [watch.peaks[layer] for layer in watch.began],
        "layer_seconds": [end - begin for begin, end in pairwise(starts)],
    }  # fmt: skip
    Path(job["found"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
