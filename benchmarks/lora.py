"""A LoRA trained with PEFT on the packed reference model at 2 bits, on German text. Writes docs/results/lora.md."""

import argparse
import shutil
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

import moqa

ROOT = Path(__file__).parents[1]
MODEL, TEXT, RUNS = ROOT / "reference" / "model", ROOT / "reference" / "text", ROOT / "runs" / "lora"
HELD_OUT = {name: str(TEXT / f"{name}.test.txt") for name in ("german", "wiki")}
CONTEXT, BATCH, RANK, RATE = 128, 4, 8, 1e-3


def checkpoint() -> Path:
    shutil.rmtree(RUNS, ignore_errors=True)
    wiki = {"wiki": str(TEXT / "wiki.calib.txt")}
    profile = moqa.profile(MODEL, wiki, RUNS / "profile", samples=2, context=64, sensitivity=False)
    plan = moqa.plan(profile, None, strategy="uniform", widths=[2])
    return moqa.quantize(MODEL, plan, RUNS / "out", method="rtn")


def train(out: Path, targets: str | list[str], steps: int, folder: Path) -> tuple[int, float]:
    """Trained parameters, and seconds."""
    torch.manual_seed(0)
    base, tokenizer = moqa.load(out)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    ids = torch.tensor(tokenizer((TEXT / "german.calib.txt").read_text(encoding="utf-8"))["input_ids"])
    windows = ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    windows = windows[torch.randperm(len(windows))]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    start = time.perf_counter()
    for step in range(steps):
        batch = windows[torch.arange(step * BATCH, (step + 1) * BATCH) % len(windows)]
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"{step}: {loss.item():.3f}", flush=True)
    seconds = time.perf_counter() - start
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in trained), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    torch.set_num_threads(2)
    out = checkpoint()

    def row(name: str, model: Path, lora: Path | None = None, trained: str = "", seconds: str = "") -> str:
        found = moqa.evaluate(model, HELD_OUT, windows=32, lora=lora).distributions
        perplexities = " | ".join(f"{found[text].perplexity:.2f}" for text in HELD_OUT)
        return f"| {name} | {trained} | {seconds} | {perplexities} |"

    rows = [row("the original, bfloat16", MODEL), row("2 bits, rounded", out)]
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    for name, targets in (("attention", attention), ("attention and experts", "all-linear")):
        folder = RUNS / name.replace(" ", "-")
        trained, seconds = train(out, targets, steps, folder)
        rows.append(row(f"+ LoRA on {name}", out, folder, f"{trained:,}", f"{seconds:.0f}"))
    table = "\n".join(rows)
    (ROOT / "docs" / "results" / "lora.md").write_text(f"""# LoRA on packed weights

Command: `python benchmarks/lora.py`. Reference model, uniform 2 bits, rounded; LoRA of rank {RANK} trained on German
text for {steps} steps of {BATCH} windows of {CONTEXT} tokens (AdamW, learning rate {RATE:g}), 2 threads, saved, and
measured with `moqa evaluate --lora`: perplexity on held-out text, 32 windows of 256 tokens each. Wiki was not trained
on; its column shows what German costs there.

| | trained parameters | seconds of training | German | wiki |
|---|---:|---:|---:|---:|
{table}
""")


if __name__ == "__main__":
    main()
