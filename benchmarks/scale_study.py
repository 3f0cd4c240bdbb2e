"""A checkpoint larger than the memory it is quantized in: time, memory and disk of every stage, and what follows.

A random checkpoint of OLMoE-1B-7B's shape (16 layers of 64 experts, 14 GB) is profiled, quantized with gptq and with
rtn at 3 bits, each in a process of its own with 4 GiB. Writes runs/scale/summary.json; `scale_page.py` makes
docs/results/scale.md of it.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import random_model
import torch
from demo import MODEL as REFERENCE
from demo import ROOT, TEXT
from torch import Tensor

from moqa.format.scheme import Scheme
from moqa.kernels import PackedMatrix, find_grid_kernels, find_kernels
from moqa.kernels.native import read
from moqa.models.products import fast_sums

RUNS = ROOT / "runs" / "scale"
MODEL, SUMMARY = RUNS / "olmoe", RUNS / "summary.json"
MEMORY, BITS, WINDOWS, CONTEXT = "4GiB", 3, 64, 256
STAGES = ("profile", "dry run", "gptq", "rtn", "one command")
GIB = 2**30
# runs a command and says how many KiB of it were resident at most; as a child of this process it would begin with ours
LARGEST = (
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
)


def fastest(work: object, times: int = 5) -> float:
    """Seconds of the fastest of some calls."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        work()  # type: ignore[operator]
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def machine() -> dict[str, float | str | int]:
    """Rates that stages are measured against: products per second (2 operations each), bytes read per second."""
    side = 2048
    rates: dict[str, float | str | int] = {"processor": platform.processor() or platform.machine()}
    rates["threads"] = torch.get_num_threads()
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a: Tensor = torch.randn(side, side).to(dtype)
        rates[name] = 2 * side**3 / fastest(lambda a=a: a @ a)
    x = torch.randn(side, side)
    with fast_sums():
        rates["sums"] = 2 * side**3 / fastest(lambda: x @ x)
    gram = x.T @ x + torch.eye(side)
    rates["factors"] = side**3 / 3 / fastest(lambda: torch.linalg.cholesky_ex(gram))
    scheme = Scheme(width=BITS)
    tensors = {
        suffix: torch.zeros(stored, dtype=dtype) for suffix, (dtype, stored) in scheme.tensors((side, side)).items()
    }
    matrix = PackedMatrix(scheme, (side, side), tensors)
    rates["packed"] = 2 * side**3 / fastest(lambda: find_kernels().linear(matrix, x))
    rates["fitted"] = x.numel() / fastest(
        lambda: find_grid_kernels().fit_grid(x[None], torch.full((1, side), BITS), Scheme(width=BITS), None)
    )
    much = torch.zeros(GIB, dtype=torch.uint8)
    rates["memory"] = GIB / fastest(lambda: read(much))
    return rates


def disk_rate() -> float:
    """Bytes per second of reading all shards from the first byte to the last, not from the system's memory."""
    forget_cached()
    buffer, size, began = bytearray(16 * 2**20), 0, time.perf_counter()
    for shard in sorted(MODEL.glob("*.safetensors")):
        with shard.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                size += count
    return size / (time.perf_counter() - began)


def forget_cached() -> None:
    """Leave nothing of the checkpoint in the system's memory: every stage reads it from the disk."""
    for path in MODEL.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model's decoder layers: `attention` and `shared` are weights outside the routed experts."""

    layers: int
    hidden: int
    width: int
    experts: int
    top: int
    attention: int
    shared: int = 0

    @property
    def expert(self) -> int:
        return 3 * self.width * self.hidden

    @property
    def layer(self) -> int:
        """Weights of a layer."""
        return self.experts * self.expert + self.attention + self.shared


OLMOE = Shape(16, 2048, 1024, 64, 8, 4 * 2048 * 2048)


def operations(shape: Shape, tokens: int, rates: dict) -> dict[str, dict[str, float]]:
    """For each part of quantizing all layers with gptq: operations, and seconds at the machine's measured rates."""
    h, w, experts, top = shape.hidden, shape.width, shape.experts, shape.top
    fit, check, dense = tokens * 7 / 8, tokens / 8, shape.attention + shape.shared
    # errors into the other columns: half of 2 x rows x in^2; of what is no expert as if all of it had `hidden` inputs
    solving = experts * (2 * w * h * h + h * w * w) + dense * h
    comparing = 3 * 2 * (shape.expert * check * top + dense * min(check, h))
    found = {
        "run the layer, sum attention's inputs": {"bfloat16": 2 * tokens * dense, "sums": tokens * 2 * h * h},
        "sum experts' inputs": {"bfloat16": 2 * tokens * top * 2 * w * h, "sums": fit * top * (h * h + w * w)},
        "solve": {"factors": (experts * (h**3 + w**3) + dense * h) / 3, "sums": solving + comparing},
        "run the quantized layer": {"packed": 2 * tokens * (dense + top * shape.expert)},
    }  # fmt: skip
    return {
        part: {
            "operations": shape.layers * sum(counts.values()),
            "seconds_at_full_rate": shape.layers * sum(count / rates[kind] for kind, count in counts.items()),
        }
        for part, counts in found.items()
    }


def stage(name: str, threads: int) -> dict:
    """Run one stage in a process of its own."""
    job = {
        "stage": name, "model": str(MODEL), "text": str(TEXT / "wiki.calib.txt"), "profile": str(RUNS / "profile"),
        "out": str(RUNS / name), "memory": MEMORY, "bits": BITS, "windows": WINDOWS, "context": CONTEXT,
        "threads": threads, "found": str(RUNS / f"{name}.found.json"),
    }  # fmt: skip
    shutil.rmtree(RUNS / name, ignore_errors=True)
    (RUNS / f"{name}.job.json").write_text(json.dumps(job))
    forget_cached()
    subprocess.run([sys.executable, Path(__file__).with_name("scale_stage.py"), RUNS / f"{name}.job.json"], check=True)
    return json.loads(Path(job["found"]).read_text())


def one_command(model: Path) -> dict[str, dict]:
    """What a dry run foretells of one command, from texts to the comparison with others, and what it takes."""
    with tempfile.TemporaryDirectory(dir=RUNS) as folder:
        command = [
            sys.executable, "-m", "moqa", "quantize", str(model), "--data", f"wiki={TEXT / 'wiki.calib.txt'}", "--bpw",
            str(BITS), "--samples", str(WINDOWS // 4), "-o", f"{folder}/out",
        ]  # fmt: skip
        subprocess.run([*command, "--dry-run", "--json", f"{folder}/dry.json"], check=True, stdout=subprocess.DEVNULL)
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", LARGEST, *command], check=True, capture_output=True, text=True)
        measured = {"seconds": time.perf_counter() - began, "peak_bytes": int(done.stdout.split()[-1]) * 1024}
        return {"foretold": json.loads(Path(f"{folder}/dry.json").read_text()), "measured": measured}


def one_commands() -> dict[str, dict]:
    """The same for the reference model and for one of 441M parameters."""
    models = {"reference": REFERENCE, "random-441M": RUNS / "random-441M"}
    random_model.make(models["random-441M"])
    return {name: one_command(folder) for name, folder in models.items()}


def main() -> None:
    stages = sys.argv[1:] or STAGES
    RUNS.mkdir(parents=True, exist_ok=True)
    random_model.make(MODEL, random_model.olmoe())
    summary = json.loads(SUMMARY.read_text()) if SUMMARY.exists() else {}
    if "gptq" in stages or "machine" not in summary:
        # its shares of the machine's rates are those of the same run
        summary["machine"] = summary.get("machine", {}) | machine()
    summary["checkpoint_bytes"] = sum(path.stat().st_size for path in MODEL.glob("*.safetensors"))
    summary["settings"] = {"memory": MEMORY, "bits": BITS, "windows": WINDOWS, "context": CONTEXT}
    summary["operations"] = operations(OLMOE, WINDOWS * CONTEXT, summary["machine"])
    for name in stages:
        print(f"{name} ...", file=sys.stderr, flush=True)
        # a disk's rate changes while the other stages run
        disk = disk_rate() if name == "rtn" else 0.0
        summary[name] = one_commands() if name == "one command" else stage(name, int(summary["machine"]["threads"]))
        if name == "rtn":
            summary["machine"]["disk"] = (disk + disk_rate()) / 2
        SUMMARY.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
