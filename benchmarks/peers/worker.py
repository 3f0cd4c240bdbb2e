"""One tool quantizes one model, in the interpreter that has the tool: `python -P worker.py JOB.json`.

A tool is a file of this folder with two functions: `quantize(job)` goes from a model's folder to a folder of its own,
`dense(job)` gives name and decoded weights of every matrix that is quantized there. Without -P the files of this folder
would hide the packages that they are named after.
"""

import importlib.metadata
import json
import os
import runpy
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file


def main() -> None:
    # one core as well: a tool may have threads of its own
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    file = Path(sys.argv[1])
    job = json.loads(file.read_text())
    tool = runpy.run_path(str(Path(__file__).with_name(f"{job['tool']}.py")))
    torch.set_num_threads(1)
    started, used = time.perf_counter(), time.process_time()
    tool["quantize"](job)
    report = {
        "version": importlib.metadata.version(job["tool"]),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - used,
        "peak_bytes": int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024,
        "bytes": sum(path.stat().st_size for path in Path(job["out"]).glob("*.safetensors")),
        "finished": time.time(),
    }
    # not counted: only the comparison needs it
    save_file({name: weight.float().contiguous() for name, weight in tool["dense"](job)}, file.with_name("dense"))
    file.with_name("report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
