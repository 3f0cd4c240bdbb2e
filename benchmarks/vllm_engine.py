"""vLLM in a process of its own, for tests and measurements: one engine, the steps of a job one after the other.

    benchmarks/vllm_engine.py JOB.json RESULT.pt

A step is `["generate", prompts, tokens]`, `["call", method, arguments of a worker's method]`, after which vLLM's prefix
cache is reset, or `["speed", requests, tokens of each prompt, tokens to write, tries]`. The result is a list with an
entry for each step: for `generate`, by prompt, its ids and those written, and their logits; for `call` what each worker
returned; for `speed`, the tokens per second that all requests together wrote after their first in the best try, and per
second of the processor in the engine's processes, whatever else the machine did.
"""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from random import Random
from time import perf_counter

import torch

# one thread and 1 GiB for keys and values, of a machine that others use, too
QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip
# for a job with `avx2`: torch's own code, and vLLM's engine in this process, where its choices can be changed
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# `make .peers/vllm/.ready`
PYTHON = Path(__file__).parents[1] / ".peers" / "vllm" / "bin" / "python"
SMALL = {"max_model_len": 256, "max_num_seqs": 8}


def in_vllm(work: Path, model: Path, steps: list, **options: object) -> list:
    """The results of a job, from a process in vLLM's environment."""
    job, result = work / "job.json", work / "result.pt"
    job.write_text(json.dumps({"model": str(model), "options": options, "steps": steps}))
    subprocess.run([PYTHON, Path(__file__), job, result], check=True, env=QUIET | os.environ, cwd=work)
    return torch.load(result)


def main(job: dict) -> list:
    """Start an engine, and run the steps of a job."""
    if job.get("avx2"):
        _without_avx512()
    from vllm import LLM

    llm = LLM(job["model"], max_logprobs=-1, logprobs_mode="raw_logits", **SMALL | job.get("options", {}))
    assert not job.get("avx2") or "vllm/_C_AVX2." in Path("/proc/self/maps").read_text()
    steps = {"generate": _generate, "call": _call, "speed": _speed}
    return [steps[kind](llm, *rest) for kind, *rest in job["steps"]]


def _without_avx512() -> None:
    """Let torch, vLLM and moqa run the code that they have for processors with AVX2 alone: `AVX2` is set, too."""
    from moqa.kernels.native import use_path

    for name in ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_vnni_supported", "_is_amx_tile_supported"):
        assert hasattr(torch.cpu, name)
        setattr(torch.cpu, name, lambda: False)
    assert torch.backends.cpu.get_cpu_capability() == "AVX2"
    use_path("avx2")


def _generate(llm: object, prompts: list[str | dict], tokens: int) -> list[dict]:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=tokens, logprobs=-1, ignore_eos=True)
    found = []
    for answer in llm.generate(prompts, greedy, use_tqdm=False):
        written = answer.outputs[0]
        rows = [[step[token].logprob for token in range(len(step))] for step in written.logprobs]
        ids = list(written.token_ids)
        found.append({"prompt": list(answer.prompt_token_ids), "ids": ids, "logits": torch.tensor(rows)})
    return found


def _call(llm: object, method: str, *arguments: object) -> object:
    try:
        answers = llm.collective_rpc(method, args=tuple(arguments))
    except Exception as error:  # of a worker; the caller looks at what it says
        return f"refused: {error}"
    llm.reset_prefix_cache()
    return answers


def _speed(llm: object, requests: int, before: int, tokens: int, tries: int) -> tuple[float, float]:
    import psutil
    from vllm import SamplingParams, TokensPrompt

    engine = psutil.Process().children(recursive=True)

    def now() -> tuple[float, float]:
        return perf_counter(), sum(sum(process.cpu_times()[:2]) for process in engine)

    random, seconds = Random(0), {1: [], tokens: []}
    for _, count in product(range(tries + 1), seconds):
        # other tokens in each try: the prefix cache would have them
        prompts = [TokensPrompt(prompt_token_ids=random.choices(range(1000), k=before)) for _ in range(requests)]
        start = now()
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True), use_tqdm=False)
        seconds[count].append([after - before for before, after in zip(start, now(), strict=True)])
    least = {count: [min(clock) for clock in zip(*found[1:], strict=True)] for count, found in seconds.items()}
    wall, processor = (requests * (tokens - 1) / (least[tokens][clock] - least[1][clock]) for clock in range(2))
    return wall, processor


if __name__ == "__main__":
    torch.save(main(json.loads(Path(sys.argv[1]).read_text())), sys.argv[2])
