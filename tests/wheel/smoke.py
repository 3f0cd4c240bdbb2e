"""Test an installed moqa, with its own environment's Python: `python smoke.py VERSION`.

Uses nothing of the repository: neither its modules, nor its tests, nor the reference model.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

TEXT = Path("text.txt")
MODEL, OUT = Path("model"), Path("out")
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "cmake", "ninja", "make")


def main(version: str) -> None:
    """Everything, from the import to the tokens of a quantized model."""
    found = [name for name in COMPILERS if shutil.which(name)]
    assert not found, f"{found} are on PATH: the test is void"
    imports(version)
    commands()
    make_model()
    quantizes()
    computes()
    print("smoke: passed")


def imports(version: str) -> None:
    """It is the installed one, and light."""
    import moqa

    assert Path(moqa.__file__).is_relative_to(sys.prefix), moqa.__file__
    assert moqa.__version__ == version, f"version {moqa.__version__}, the wheel's is {version}"
    assert "torch" not in sys.modules
    print(f"smoke: moqa {moqa.__version__} on Python {sys.version.split()[0]}")


def commands() -> None:
    """The command is there and knows its parts."""
    shown = command("--help")
    assert all(name in shown for name in ("profile", "plan", "quantize", "evaluate", "serve")), shown


def command(*typed: str) -> str:
    """What a command prints."""
    done = subprocess.run(
        [Path(sys.executable).with_name("moqa"), *typed], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def make_model() -> None:
    """A random Mixture-of-Experts of two layers, and a tokenizer for its text."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    TEXT.write_text("".join(f"Sentence {n} of the text has a number, {n * n}, and an end.\n" for n in range(2000)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT.read_text()], trainer)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4,
        num_experts_per_tok=2, bos_token_id=None, eos_token_id=0, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(MODEL)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(MODEL)


def quantizes() -> None:
    """A uniform plan, rounded; the checkpoint is sound."""
    import moqa

    profile = moqa.profile(
        MODEL, {"text": TEXT}, "profile", samples=2, context=32, self_samples=0, method="rtn", sensitivity=False
    )
    plan = moqa.plan(profile, strategy="uniform", widths=(4,))
    moqa.quantize(MODEL, plan, OUT, method="rtn", profile=profile)
    shown = command("verify", str(OUT))
    assert "sound" in shown, shown
    print(f"smoke: {shown.strip()}")


def computes() -> None:
    """The native kernels are there, are taken, and give the reference's numbers up to their rounding of inputs."""
    import torch

    import moqa
    from moqa.kernels import PackedMatrix, find_kernels, native

    kernels, reference = find_kernels("auto"), find_kernels("reference")
    assert kernels.name == "native", f"auto takes the {kernels.name} kernels: {find_kernels('native')}"
    model, tokenizer = moqa.load(OUT)
    matrix = next(module for module in model.modules() if isinstance(module, PackedMatrix))
    x = torch.randn(5, matrix.shape[1])
    print(f"smoke: native kernels, path {native.paths()[0]} of {', '.join(native.paths())}")
    for path in native.paths():
        native.use_path(path)
        close(kernels.linear(matrix, x), reference.linear(matrix, x), f"a product on path {path}")
    native.use_path(native.paths()[0])
    tokens = tokenizer("Sentence 7 of the text", return_tensors="pt").input_ids
    exact = moqa.load(OUT, kernels="reference")[0](tokens).logits
    logits = model(tokens).logits
    assert logits.isfinite().all()
    close(logits, exact, "logits")
    written = list(moqa.generate(model, tokenizer, "Sentence", moqa.Sampling(max_tokens=8, seed=1)))
    assert written[-1].finish is not None
    print("smoke: products, logits and tokens are right")


def close(found, wanted, what: str) -> None:
    """Within what 8-bit inputs cost; a wrong layout or scale is off by a whole."""
    off = ((found - wanted).norm() / wanted.norm()).item()
    assert off < 0.05, f"{what}: off by {off:.3f} of the reference"


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(sys.argv[1])
