"""Tiny random models that llama.cpp runs, with the reference model's tokenizer, and llama.cpp itself if it is there."""

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

REFERENCE = Path(__file__).parents[1] / "reference" / "model"
_COMMON = {
    "vocab_size": 8192, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "max_position_embeddings": 128, "intermediate_size": 96, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
MODELS = {
    "qwen3_moe": {**_EXPERTS, "head_dim": 64, "norm_topk_prob": True},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 64, "norm_topk_prob": False},
    "olmoe": {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama": {},
    "qwen3": {"head_dim": 64, "tie_word_embeddings": True},
    "qwen2": {},
}


def make_model(folder: Path, kind: str = "qwen3_moe", **changes: object) -> Path:
    """Folder of a model whose down projections have rows of 96 weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**_COMMON, **MODELS[kind], **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / name, folder / name)
    return folder


class LlamaCpp:
    """A file opened by llama.cpp itself; the test is skipped where it is not installed (`make bench` compiles it)."""

    def __init__(self, path: Path) -> None:
        self._api = api = pytest.importorskip("llama_cpp")
        options = api.llama_model_default_params()
        self._model = api.llama_model_load_from_file(str(path).encode(), options)
        assert self._model, f"llama.cpp does not load {path}"
        self._vocabulary = api.llama_model_get_vocab(self._model)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text."""
        found = (self._api.llama_token * 4096)()
        data = text.encode()
        count = self._api.llama_tokenize(self._vocabulary, data, len(data), found, len(found), False, False)
        return list(found[:count])

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[tokens, vocabulary] of one text, float32."""
        api, count = self._api, len(tokens)
        options = api.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = max(count, 32)
        options.n_threads = options.n_threads_batch = 1
        # its cache of keys and values in 32 bits, as ours
        options.type_k = options.type_v = 0
        context = api.llama_init_from_model(self._model, options)
        batch = api.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, 1
        assert api.llama_decode(context, batch) == 0
        words = api.llama_vocab_n_tokens(self._vocabulary)
        pointer = ctypes.cast(api.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        found = np.ctypeslib.as_array(pointer, (count, words)).copy()
        api.llama_batch_free(batch)
        api.llama_free(context)
        return torch.from_numpy(found)
