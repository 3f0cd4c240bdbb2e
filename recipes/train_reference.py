"""Train a model like the reference model, from scratch, on the texts that recipes/corpus.py collects.

    python recipes/train_reference.py --corpus runs/corpus -o runs/reference --minutes 80

With --minutes the learning rate follows the clock, so two runs differ; with --steps a run depends on --seed alone.
An interrupted run goes on from its last checkpoint when the same command is given again.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from reference_model import Recipe, backward, bits_per_byte, model_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

MIX = {"wiki": 0.36, "python": 0.16, "novels": 0.13, "german": 0.13, "math": 0.11, "french": 0.11}
END = "<|endoftext|>"
TOKENIZER_CHARACTERS = 30_000_000  # of the train splits, shared out by the mix
ENCODE_CHARACTERS = 100_000  # encoded at a time
# glibc gives large blocks back to the system after every step and faults them in again; keep them.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "68719476736",
    "MALLOC_TOP_PAD_": "268435456",
}


class RecipeError(Exception):
    """Something the user can put right."""


def read_split(corpus: Path, name: str, split: str) -> str:
    path = corpus / f"{name}.{split}.txt"
    if not path.exists():
        raise RecipeError(f"{path} is missing; collect it with: python recipes/corpus.py -o {corpus} --sources {name}")
    return path.read_bytes().decode(errors="ignore")


def train_tokenizer(corpus: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(
        (read_split(corpus, name, "train")[: int(share * TOKENIZER_CHARACTERS)] for name, share in MIX.items()), trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END, model_max_length=2_048)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    parts = (text[start : start + ENCODE_CHARACTERS] for start in range(0, len(text), ENCODE_CHARACTERS))
    return np.concatenate([np.array(tokenizer.backend_tokenizer.encode(part).ids, dtype=np.uint16) for part in parts])


def batch(texts: dict[str, np.ndarray], recipe: Recipe, step: int, context: int) -> Tensor:
    """[sequences, context + 1] tokens; a function of seed and step, so that a resumed run draws the same."""
    random = np.random.default_rng([recipe.seed, step])
    names = random.choice(list(MIX), size=recipe.batch_tokens // context, p=list(MIX.values()))
    starts = [random.integers(len(texts[name]) - context) for name in names]
    rows = [texts[name][start : start + context + 1] for name, start in zip(names, starts, strict=True)]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """Warm-up, then constant for 30 % of the run, then linear to 2 %."""
    decay = 1.0 if progress < 0.3 else 1.0 - 0.98 * (progress - 0.3) / 0.7
    return recipe.peak_rate * min(1.0, (step + 1) / recipe.warmup_steps) * decay


def held_out_scores(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, texts: dict[str, str], recipe: Recipe
) -> dict[str, float]:
    # In the byte-level alphabet every byte is one character.
    bytes_of = torch.tensor([len(token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))])
    tokens = {name: torch.from_numpy(encode(tokenizer, text).astype(np.int64)) for name, text in texts.items()}
    return {name: bits_per_byte(model, ids, bytes_of, max(recipe.contexts)) for name, ids in tokens.items()}


def parameter_groups(model: nn.Module) -> list[dict]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in parameters if parameter.ndim == 1], "weight_decay": 0.0},
    ]


def train(
    corpus: Path,
    out: Path,
    recipe: Recipe,
    checkpoint_minutes: float = 5.0,
    on_step: Callable[[int, float, float], None] | None = None,
) -> dict[str, float]:
    """Train, write the model and its tokenizer to `out`, and return the held-out bits per byte of every source."""
    if (out / "model.safetensors").exists():
        raise RecipeError(f"{out} already holds a finished model; choose another folder with -o")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(corpus, recipe.vocab_size)
    texts = {name: encode(tokenizer, read_split(corpus, name, "train")) for name in MIX}
    short = [name for name, tokens in texts.items() if len(tokens) <= max(recipe.contexts)]
    if short:
        raise RecipeError(f"the train split of {', '.join(short)} is shorter than one context")
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(model_config(recipe), dtype=torch.float32)
    model.set_experts_implementation("sorted")
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=recipe.peak_rate, betas=(0.9, 0.95), fused=True)
    digest = hashlib.sha256(b"".join(tokens.tobytes() for tokens in texts.values())).hexdigest()
    made_from = {"recipe": json.loads(json.dumps(asdict(recipe))), "tokens": digest}
    checkpoint = out / "checkpoint.pt"
    step, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["made_from"] != made_from:
            raise RecipeError(f"{checkpoint} is of a run with another recipe or corpus; delete it or choose another -o")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]

    saved_at = time.monotonic()
    while (progress := step / recipe.steps if recipe.steps else seconds / (60 * recipe.minutes)) < 1.0:
        started = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, progress)
        loss = backward(model, batch(texts, recipe, step, recipe.contexts[progress >= 0.8]))
        if not math.isfinite(loss):
            raise RecipeError(f"the loss is {loss} at step {step}; try a lower --peak-rate")
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        seconds += time.monotonic() - started
        if time.monotonic() - saved_at >= 60 * checkpoint_minutes:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state | {"seconds": seconds, "made_from": made_from}, out / "checkpoint.unfinished")
            (out / "checkpoint.unfinished").replace(checkpoint)
            saved_at = time.monotonic()
        if on_step is not None:
            on_step(step, loss, progress)

    model.eval()
    scores = held_out_scores(model, tokenizer, {name: read_split(corpus, name, "test") for name in MIX}, recipe)
    record = made_from | {"steps": step, "seconds": round(seconds), "held_out_bits_per_byte": scores}
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    tokenizer.save_pretrained(out)
    model.to(torch.bfloat16).save_pretrained(out)
    checkpoint.unlink(missing_ok=True)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a model like the reference model.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder that recipes/corpus.py wrote")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for checkpoints and the model")
    parser.add_argument("--minutes", type=float, default=Recipe.minutes, help="time to train (default: 80)")
    parser.add_argument("--steps", type=int, help="train this many steps instead; reproducible")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--peak-rate", type=float, default=Recipe.peak_rate, help="learning rate (default: 2.5e-3)")
    options = parser.parse_args()
    if options.minutes <= 0 or (options.steps is not None and options.steps < 1):
        raise SystemExit("train_reference: --minutes and --steps must be above 0")
    if sys.platform == "linux" and not MALLOC.keys() <= os.environ.keys():  # malloc reads them at the start only
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | MALLOC)

    def show(step: int, loss: float, progress: float) -> None:
        if step % 20 == 0:
            print(f"step {step:5d}  {progress:4.0%}  loss {loss:.3f}", flush=True)

    recipe = Recipe(steps=options.steps, minutes=options.minutes, seed=options.seed, peak_rate=options.peak_rate)
    try:
        scores = train(options.corpus, options.out, recipe, on_step=show)
    except (RecipeError, OSError) as error:
        raise SystemExit(f"train_reference: {error}") from None
    for name, bits in scores.items():
        print(f"{name:8} {bits:.3f} held-out bits per byte")


if __name__ == "__main__":
    main()
