"""Small language models of one loss by different optimizers: what rounding costs each of them, and what foretells it.

Adds rows to runs/trained/summary.json and writes docs/results/optimizers.md; rows that are there are kept. A model of
each optimizer and seed takes some minutes of one core.
"""

import argparse
import copy
import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from demo import KNOWN, NOVEL, TEXT
from optimizers_page import write_page
from pytorch_optimizer import ScalableShampoo
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from trained_rows import Row, add, known
from transformers import LlamaConfig, LlamaForCausalLM

from moqa.format.scheme import Scheme
from moqa.qat import Inputs, prepare
from moqa.training.loop import scheduled
from moqa.training.optimizers import OPTIMIZERS

# bytes are the tokens
HIDDEN, INNER, LAYERS, HEADS, CONTEXT, WINDOWS = 128, 256, 3, 4, 128, 8
# training stops at this loss per byte of held-out known text, in nats; looked at every so many steps
WANTED, EVERY, MOST, WARM_UP = 2.5, 10, 500, 20
# of weights of the blocks; a step of Muon is a fifth as long. Embedding, head, norms and grids have AdamW everywhere
RATES, OTHERS_RATE = {"adamw": 3e-3, "muon": 1e-2, "soap": 3e-3, "shampoo": 3e-3}, 3e-3
# steps of training with the rounding in the loop, from the trained model; the control is trained on without it
MORE, MORE_RATE = 40, 0.3
HELD = 24
SETTINGS: dict[str, tuple[Scheme, Inputs | None]] = {
    "W4A4": (Scheme(width=4, group_size=128, symmetric=True), Inputs(4)),
    "W3": (Scheme(width=3, group_size=128, symmetric=True), None),
}
TRAINED = "W4A4"
KEEP = ("*embed_tokens", "lm_head")


def shampoo(parameters: list[nn.Parameter], rate: float) -> list[torch.optim.Optimizer]:
    """Shampoo with RMSProp's lengths of steps; no member of moqa's registry, because its state is not of tensors."""
    return [
        ScalableShampoo(
            parameters, lr=rate, betas=(0.9, 0.95), moving_average_for_momentum=True, start_preconditioning_step=EVERY,
            preconditioning_compute_steps=EVERY, graft_type=3, use_svd=True,
        )
    ]  # fmt: skip


MAKE: dict[str, Callable[[list[nn.Parameter], float], list[torch.optim.Optimizer]]] = {
    **{name: OPTIMIZERS[name].make for name in ("adamw", "muon", "soap")}, "shampoo": shampoo,
}  # fmt: skip


@cache
def text(name: str, split: str) -> Tensor:
    """[bytes] of a text."""
    return torch.frombuffer(bytearray((TEXT / f"{name}.{split}.txt").read_bytes()), dtype=torch.uint8)


def batches(seed: int) -> Iterator[Tensor]:
    """[windows, context + 1] bytes of known texts."""
    random = torch.Generator().manual_seed(seed)
    while True:
        rows = []
        for chosen in torch.randint(len(KNOWN), (WINDOWS,), generator=random).tolist():
            source = text(KNOWN[chosen], "calib")
            start = int(torch.randint(len(source) - CONTEXT, (), generator=random))
            rows.append(source[start : start + CONTEXT + 1])
        yield torch.stack(rows).long()


@cache
def held_out(names: tuple[str, ...]) -> Tensor:
    """[windows, context + 1] bytes of held-out texts, evenly from each."""
    found = []
    for name in names:
        source = text(name, "test")
        starts = torch.linspace(0, len(source) - CONTEXT - 1, HELD // len(names)).long().tolist()
        found += [source[start : start + CONTEXT + 1] for start in starts]
    return torch.stack(found).long()


def new_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=CONTEXT, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).float()


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    logits = model(input_ids=windows[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def known_loss(model: nn.Module) -> float:
    return float(loss_of(model, held_out(KNOWN)))


def train(
    model: nn.Module, optimizer: str, rate: float, seed: int, steps: int, *, falls: bool = False, wanted: float = 0.0
) -> int:
    """Train; returns after how many steps it ended.

    Args:
        model: trained in place.
        optimizer: of the matrices of the blocks.
        rate: of these.
        seed: of the order of the text.
        steps: at most.
        falls: whether rates fall by half a cosine; else they stay.
        wanted: ends at this loss on held-out text.
    """
    of_blocks = [
        parameter
        for name, parameter in model.named_parameters()
        if ".layers." in name and parameter.dim() == 2 and name.endswith(("weight", "original"))
    ]
    others = [parameter for parameter in model.parameters() if not any(parameter is one for one in of_blocks)]
    parts = [(rate, MAKE[optimizer](of_blocks, rate)), (OTHERS_RATE, MAKE["adamw"](others, OTHERS_RATE))]
    for step, windows in zip(range(steps), batches(seed), strict=False):
        share = MORE_RATE * scheduled(step, steps) if falls else min(1.0, (step + 1) / WARM_UP)
        loss = loss_of(model, windows)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for peak, optimizers in parts:
            for one in optimizers:
                for group in one.param_groups:
                    group["lr"] = peak * share
                one.step()
        if not torch.isfinite(loss) or (wanted and (step + 1) % EVERY == 0 and known_loss(model) <= wanted):
            return step + 1
    return steps


@contextmanager
def seen(model: nn.Module, paths: list[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Inputs and outputs of modules in the last forward pass."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            found[path] = (inputs[0], output[0] if isinstance(output, tuple) else output)

        return hook

    hooks = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    yield found
    for hook in hooks:
        hook.remove()


def layers_of(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in path]


@torch.no_grad()
def outliers(model: nn.Module) -> dict[str, float]:
    """Ratio of the largest to the mean size of a row of inputs (MMR), and kurtosis; means over rows and layers."""
    paths, ratios, tails = layers_of(model), [], []
    with seen(model, paths) as found:
        model(input_ids=held_out(KNOWN)[:, :-1])
    for path in paths:
        x = found[path][0].flatten(0, 1)
        ratios.append(float((x.abs().amax(-1) / x.abs().mean(-1)).mean()))
        centred = x - x.mean(-1, keepdim=True)
        tails.append(float((centred.pow(4).mean(-1) / centred.square().mean(-1).square()).mean()))
    return {"mmr": sum(ratios) / len(ratios), "kurtosis": sum(tails) / len(tails)}


@torch.no_grad()
def deviation(original: nn.Module, rounded: nn.Module) -> dict[str, float]:
    """Squared relative deviation after the last block, and which share of each layer's error came from earlier ones."""
    last, paths = f"model.layers.{LAYERS - 1}", layers_of(original)
    windows = held_out(KNOWN)[:, :-1]
    with seen(original, [*paths, last]) as wanted, seen(rounded, [*paths, last]) as found:
        original(input_ids=windows)
        rounded(input_ids=windows)
    h, q = wanted[last][1], found[last][1]
    shares = []
    for path in paths:
        # what the original's layer makes of the changed inputs
        passed = original.get_submodule(path)(found[path][0]) - wanted[path][1]
        local = found[path][1] - wanted[path][1] - passed
        shares.append(float(passed.square().sum() / (passed.square().sum() + local.square().sum())))
    relative = (h - q).square().sum(-1) / h.square().sum(-1)
    return {"deviation": float(relative.mean()), "passed_on": sum(shares) / len(shares)}


@torch.no_grad()
def quality(rounded: nn.Module, original: nn.Module) -> dict[str, float]:
    """Loss and accuracy on held-out known text, and divergence from the original on known and novel text."""
    found: dict[str, float] = {}
    for role, names in (("known", KNOWN), ("novel", NOVEL)):
        windows = held_out(names)
        mine, its = (m(input_ids=windows[:, :-1]).logits.flatten(0, 1).log_softmax(-1) for m in (rounded, original))
        found[f"kl_{role}"] = float(kl_div(mine, its, log_target=True, reduction="batchmean"))
        if role == "known":
            truth = windows[:, 1:].flatten()
            found |= {
                "loss": float(cross_entropy(mine, truth)),
                "accuracy": float((mine.argmax(-1) == truth).float().mean()),
            }
    return found


def study(optimizer: str, seed: int) -> Iterator[Row]:
    """Train a model by an optimizer, and round it in every way."""
    began = time.perf_counter()
    rate, model = RATES[optimizer], new_model(seed)
    steps = train(model, optimizer, rate, seed, MOST, wanted=WANTED)
    original = model.eval()
    facts = {"optimizer": optimizer, "rate": rate, "steps": steps, "loss_original": known_loss(original)} | outliers(
        original
    )
    for setting, (scheme, inputs) in SETTINGS.items():
        rounded = copy.deepcopy(original)
        grids = prepare(rounded, scheme, inputs=inputs, keep=KEEP)
        weights = sum(out * features for out, features in grids.shapes().values())
        facts |= {"bytes": grids.bytes, "bits_per_weight": round(8 * grids.bytes / weights, 3)}
        yield row(f"{setting}, rounded", seed, facts | deviation(original, rounded) | quality(rounded, original), began)
        if setting == TRAINED:
            control = copy.deepcopy(original)
            for one in (rounded, control):
                train(one, optimizer, rate, seed + 1000, MORE, falls=True)
            trained = facts | deviation(control, rounded) | quality(rounded, control)
            yield row(f"{setting}, trained", seed, trained | {"loss_original": known_loss(control)}, began)


def row(setting: str, seed: int, values: dict[str, Any], began: float) -> Row:
    found = {
        "system": "optimizers", "model": f"bytes, {LAYERS} blocks of {HIDDEN}", "setting": setting, "seed": seed,
        **values, "seconds": round(time.perf_counter() - began, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    """Measure what is not measured yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=MAKE, default=list(MAKE))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for optimizer in options.only:
            if not known("optimizers", optimizer=optimizer, seed=seed):
                add(list(study(optimizer, seed)))
                write_page()
    write_page()


if __name__ == "__main__":
    main()
