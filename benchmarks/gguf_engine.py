"""Speed, load time, size and memory of a Qwen3 Mixture-of-Experts in llama.cpp, next to which moqa's own engine stands.

Needs the packages gguf and llama-cpp-python; pip compiles the latter for this machine's processor, in 5 minutes. As it
has this file's name, all that uses it runs in an interpreter of its own that does not look for modules in this folder.
"""

import argparse
import ctypes
import json
import logging
import os
import random
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

MODEL = Path(__file__).parents[1] / "runs" / "random-model"
# llama.cpp's names of the file types that llama_model_quantize takes
FILE_TYPES = {"F16": "F16", "Q8_0": "Q8_0", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M", "Q2_K": "Q2_K"}
KINDS = ("BF16", *FILE_TYPES)
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def prepare(folder: Path, kind: str) -> Path:
    """GGUF file of a checkpoint folder, made beside it if it is not there.

    Every matrix is of the given kind (`llama-quantize --pure`, without importance matrix) but token embeddings and
    output weights, which stay bfloat16, and routers and norms, which llama.cpp keeps in float32.
    """
    made = folder.with_name(f"{folder.name}-{kind}.gguf")
    if not made.exists():
        part = made.with_suffix(".part")
        if kind == "BF16":
            alone("convert", str(folder), str(part))
        else:
            alone("quantize", str(prepare(folder, "BF16")), str(part), FILE_TYPES[kind])
        part.rename(made)
    return made


def measure(
    gguf: Path, threads: int, prompt_tokens: int = 512, new_tokens: int = 64, repeats: int = 5, repack: bool = True
) -> dict[str, float]:
    """Speed, load time and memory in a fresh process, and the size of the file.

    Args:
        gguf: what `prepare` made.
        threads: of prefill and decoding.
        prompt_tokens: random tokens, given at once.
        new_tokens: random tokens, given one by one after the prompt.
        repeats: of both, after one that does not count.
        repack: llama.cpp's default, reorders quantized weights as it loads: decoding gains, prefill loses.

    Returns:
        `decode_tokens_per_second` and `prefill_tokens_per_second` (medians; the best with prefix `best_`),
        `load_seconds` with the file in the page cache, `peak_bytes` with the interpreter's 40 MB, `bytes` of the file.
    """
    found = alone("run", str(gguf), threads, prompt_tokens, new_tokens, repeats, repack)
    return {**found, "bytes": gguf.stat().st_size}


def alone(function: str, *arguments: str | int) -> Any:
    """What a function of this file returns in a fresh interpreter."""
    code = (
        "import json, runpy\n"
        f"function = runpy.run_path({__file__!r})[{function!r}]\n"
        f"print(json.dumps(function(*{arguments!r})))"
    )
    # A passive OpenMP, which moqa wants, makes decoding with two threads five times slower here.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MALLOC_"))}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{function} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def system() -> str:
    """Version of the package and the processor features that it was compiled for."""
    import llama_cpp

    return f"llama-cpp-python {llama_cpp.__version__}, {llama_cpp.llama_print_system_info().decode().strip(' |')}"


def version() -> str:
    """Version of the package."""
    import llama_cpp

    return str(llama_cpp.__version__)


def logits(gguf: str, *tokens: int) -> list[float]:
    """Logits after the last of some tokens, on one thread, with keys and values in 32 bits."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    model = llama_cpp.llama_model_load_from_file(gguf.encode(), llama_cpp.llama_model_default_params())
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = len(tokens)
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = 0
    context = llama_cpp.llama_init_from_model(model, options)
    array = (llama_cpp.llama_token * len(tokens))(*tokens)
    if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))):
        raise RuntimeError(f"llama.cpp could not decode {len(tokens)} tokens")
    words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    return llama_cpp.llama_get_logits_ith(context, -1)[:words]


def writer_of(file: str | Path, architecture: str, config: Any) -> Any:
    """Writer of a GGUF file without vocabulary, with what models of all kinds say of themselves."""
    from gguf import GGUFWriter

    writer = GGUFWriter(file, architecture)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    return writer


def add_weight(writer: Any, name: str, weight: Any) -> None:
    """Adds a matrix in bfloat16, a norm or a router in float32."""
    import torch
    from gguf import GGMLQuantizationType

    if weight.dim() == 1 or name.endswith("ffn_gate_inp"):
        writer.add_tensor(f"{name}.weight", weight.float().numpy())
    else:
        raw = weight.bfloat16().contiguous().view(torch.uint8).numpy()
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=GGMLQuantizationType.BF16)


def write_out(writer: Any) -> None:
    """Writes all that was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert(folder: str, file: str) -> None:
    """Writes a checkpoint folder as a GGUF file in bfloat16, without vocabulary."""
    import torch
    from gguf import LlamaFileType
    from safetensors.torch import load_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "qwen3_moe" or not config.norm_topk_prob:
        raise ValueError(f"{folder} is no Qwen3 Mixture-of-Experts whose expert weights sum to 1, as llama.cpp has it")
    writer = writer_of(file, "qwen3moe", config)
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)

    weights = {}
    for shard in Path(folder).glob("*.safetensors"):
        weights |= {name.removesuffix(".weight"): weight for name, weight in load_file(shard).items()}

    for ours, theirs in OUTSIDE.items():
        if ours in weights:
            add_weight(writer, theirs, weights[ours])
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        for name, known_as in NAMES.items():
            add_weight(writer, f"{theirs}.{known_as}", weights[f"{ours}.{name}"])
        for role in ("gate", "up", "down"):
            experts = [weights[f"{ours}.mlp.experts.{index}.{role}_proj"] for index in range(config.num_experts)]
            add_weight(writer, f"{theirs}.ffn_{role}_exps", torch.stack(experts))
    write_out(writer)


def quantize(source: str, file: str, file_type: str) -> None:
    """Writes a bfloat16 GGUF file as a quantized one."""
    import llama_cpp
    from gguf import GGMLQuantizationType

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    options.pure = True
    options.token_embedding_type = options.output_tensor_type = GGMLQuantizationType.BF16
    if llama_cpp.llama_model_quantize(source.encode(), file.encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp could not quantize {source} to {file_type}")


def run(gguf: str, threads: int, prompt_tokens: int, new_tokens: int, repeats: int, repack: bool) -> dict[str, float]:
    """What `measure` returns, from this process."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    with Path(gguf).open("rb") as file:
        while file.read(1 << 20):  # so that it is in the page cache
            pass
    started = time.perf_counter()
    options = llama_cpp.llama_model_default_params()
    options.use_extra_bufts = repack
    # Read, not mapped: a mapped file stays resident beside the repacked weights, and is not yet read when "loaded".
    options.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    model = llama_cpp.llama_model_load_from_file(gguf.encode(), options)
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = prompt_tokens + new_tokens
    options.n_batch = prompt_tokens
    options.n_threads = options.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, options)
    load_seconds = time.perf_counter() - started

    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    ids = random.Random(0).choices(range(vocabulary), k=prompt_tokens + new_tokens)

    def decode(tokens: list[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)  # the batch only points to it
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError(f"llama.cpp could not decode {len(tokens)} tokens")
        llama_cpp.llama_synchronize(context)

    seconds = []
    for _ in range(1 + repeats):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        started = time.perf_counter()
        decode(ids[:prompt_tokens])
        prompted = time.perf_counter()
        for token in ids[prompt_tokens:]:
            decode([token])
        seconds.append((prompted - started, time.perf_counter() - prompted))
    prefill, decoding = zip(*seconds[1:], strict=True)
    return {
        "decode_tokens_per_second": new_tokens / median(decoding),
        "prefill_tokens_per_second": prompt_tokens / median(prefill),
        "best_decode_tokens_per_second": new_tokens / min(decoding),
        "best_prefill_tokens_per_second": prompt_tokens / min(prefill),
        "load_seconds": load_seconds,
        "peak_bytes": int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024,
    }


def main() -> None:
    from random_model import make

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=MODEL)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["BF16", "Q4_K", "Q2_K"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--prompts", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--new", type=int, default=64)
    options = parser.parse_args()
    if options.folder == MODEL:
        make(MODEL)
    print(alone("system"))
    print("Tokens per second: median of 5 repeats (best).\n")
    print("| kind | repacked | threads | prompt | decode | prefill | load, s | file, MB | peak, MB |")
    print("|---|---|" + "---:|" * 7)
    for kind, threads, prompt in product(options.kinds, options.threads, options.prompts):
        for repack in (False,) if kind in ("BF16", "F16") else (True, False):
            found = measure(prepare(options.folder, kind), threads, prompt, options.new, repack=repack)
            print(
                f"| {kind} | {'yes' if repack else 'no'} | {threads} | {prompt} "
                f"| {found['decode_tokens_per_second']:.0f} ({found['best_decode_tokens_per_second']:.0f}) "
                f"| {found['prefill_tokens_per_second']:.0f} ({found['best_prefill_tokens_per_second']:.0f}) "
                f"| {found['load_seconds']:.2f} | {found['bytes'] / 1e6:.1f} | {found['peak_bytes'] / 1e6:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
