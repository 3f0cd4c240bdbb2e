"""vLLM in a process of its own, for tests and measurements: one engine, the steps of a job one after the other.

    tests/vllm_engine.py JOB.json RESULT.pt

A step is `["generate", prompts, tokens]` or `["call", method, arguments of a worker's method]`; after a call, vLLM's
prefix cache is reset. The result is a list with an entry for each step: for `generate`, by prompt, its ids and those
written, and their logits; for `call` what each worker returned.
"""

import json
import os
import sys
from pathlib import Path

import torch

# one thread and 1 GiB for keys and values, of a machine that others use, too
QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip
SMALL = {"max_model_len": 256, "max_num_seqs": 8}


def main(job: dict) -> list:
    """Start an engine, and run the steps of a job."""
    from vllm import LLM

    llm = LLM(job["model"], max_logprobs=-1, logprobs_mode="raw_logits", **SMALL | job.get("options", {}))
    return [_generate(llm, *rest) if kind == "generate" else _call(llm, *rest) for kind, *rest in job["steps"]]


def _generate(llm: object, prompts: list[str], tokens: int) -> list[dict]:
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


if __name__ == "__main__":
    os.environ.update(QUIET)
    torch.save(main(json.loads(Path(sys.argv[1]).read_text())), sys.argv[2])
