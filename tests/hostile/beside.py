"""Files beside the weights: configuration, index, tokenizer."""

import dataclasses
import hashlib
import json

from hostile.victim import (
    BROKEN,
    CONFIG,
    DEEP,
    GIANT,
    HARMLESS,
    INDEX,
    MANIFEST,
    NASTY,
    REFUSED,
    SEALED,
    TOKENIZER,
    TRANSFORMERS,
    UNVERIFIED,
    WEIGHTS,
    Allowed,
    Victim,
    somewhere,
)


def index_and_quantization_config(victim: Victim) -> Allowed:
    pick = victim.random.choice
    if victim.random.random() < 0.5:
        index = victim.json(INDEX)
        weights = index["weight_map"]
        name = pick(sorted(weights))
        for _ in range(pick([1, 3])):
            change = pick(["file", "drop", "add", "field", "raw"])
            if change == "file":
                weights[name] = pick([*WEIGHTS, "../x", "/etc/passwd", "", "nowhere.safetensors", "a\nb", "x" * 5000])
            elif change == "drop":
                weights.pop(name, None)
            elif change == "add":
                weights[pick(["model.layers.0.self_attn.q_proj.weight", "lm_head.weight", "x"])] = pick(WEIGHTS)
            elif change == "field":
                parent, key = somewhere(victim, index)
                parent[key] = pick(NASTY)
            weights = index.get("weight_map")
            if not isinstance(weights, dict):
                break
        victim.write(INDEX, pick([json.dumps(index).encode()] * 3 + [pick(BROKEN + DEEP + GIANT)]))
        return HARMLESS
    config = victim.json(CONFIG)
    config["quantization_config"] = pick(
        [{"quant_method": "moqa", "verify": False}, {"quant_method": "moqa", "kernels": "reference", "x": 1},
         {"quant_method": "moqa", "kernels": "none"}, {"quant_method": "moqa", "verify": "no"},
         {"quant_method": "gptq"}, {"quant_method": "bitsandbytes"}, {"quant_method": None},
         {"quant_method": ["moqa"]}, {"quant_method": "moqa", "modules_to_not_convert": ["lm_head"]}, [], "moqa", 5]
    )  # fmt: skip
    victim.write_json(CONFIG, config)
    # the reference rounds no activations; and where nothing names moqa, transformers does not ask it
    return Allowed(differ=(TRANSFORMERS,))


def tokenizer_files(victim: Victim) -> Allowed:
    name, pick = victim.random.choice(TOKENIZER), victim.random.choice
    raw = bytearray(victim.read(name))
    change = pick(["flip", "cut", "text", "field"])
    if change == "flip":
        for _ in range(pick([1, 20])):
            raw[victim.random.randrange(len(raw))] = victim.random.randrange(256)
    elif change == "cut":
        del raw[victim.random.randrange(len(raw)) :]
    elif change == "text":
        raw = bytearray(pick(BROKEN + DEEP + GIANT))
    else:
        data = victim.json(name)
        if name == "tokenizer.json":
            data["model"] = pick([data["model"], {}, None, {"type": "BPE"}, {"type": "x"}])
            data[pick(sorted(data))] = pick(NASTY)
        else:
            parent, key = somewhere(victim, data)
            parent[key] = pick(NASTY)
        raw = bytearray(json.dumps(data).encode())
    victim.write(name, bytes(raw))
    return HARMLESS


def json_at_its_worst(victim: Victim) -> Allowed:
    victim.write(CONFIG, victim.random.choice(BROKEN + DEEP + GIANT))
    return REFUSED


def config_edits(victim: Victim) -> Allowed:
    """Another architecture than the weights were quantized for."""
    config, pick = victim.json(CONFIG), victim.random.choice
    change = pick(["size", "size", "size", "type", "drop", "field", "field", "meaning"])
    sizes = [key for key, value in config.items() if isinstance(value, int) and not isinstance(value, bool)]
    if change == "size":
        key = pick(sorted(sizes))
        size = config[key]
        config[key] = pick([size + 1, 2 * size, size // 2, 0, -1, 10**5, 2**31, 10**30, None, "8", 1.5, [8]])
    elif change == "type":
        others = ["llama", "mixtral", "qwen2_moe", "gpt2", "bert", "gpt_oss", "", None, 5, "nope", "a\nb"]
        config["model_type"] = pick(others)
    elif change == "drop":
        config.pop(pick(sorted(config)))
    elif change == "field":
        config[pick(sorted(config))] = pick(NASTY)
    else:
        key, value = pick(
            [("rms_norm_eps", 1e-3), ("hidden_act", "gelu"), ("num_experts_per_tok", 3), ("norm_topk_prob", False),
             ("rope_parameters", {"rope_type": "default", "rope_theta": 100.0}), ("tie_word_embeddings", False),
             ("sliding_window", 2), ("attention_bias", True), ("mlp_only_layers", [0]), ("decoder_sparse_step", 2),
             ("layer_types", ["sliding_attention"] * 2), ("use_sliding_window", True)]
        )  # fmt: skip
        config[key] = value
    victim.write_json(CONFIG, config)
    if victim.random.random() < 0.5:
        return HARMLESS
    digest = hashlib.sha256(victim.read(CONFIG)).hexdigest()
    victim.write_manifest(victim.json(MANIFEST) | {"config": digest})
    return dataclasses.replace(SEALED, fail=(UNVERIFIED,))


MUTATIONS = [index_and_quantization_config, tokenizer_files, json_at_its_worst]
