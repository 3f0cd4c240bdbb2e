"""The drift detector on streams that switch between the six texts: delay, false alarms, and what watching costs.

Needs the profile of benchmarks/adjust_study.py. Writes runs/adjust/drift.json and docs/results/drift-detector.md.
"""

import json
import random
import statistics
from pathlib import Path

import numpy as np
import torch
from timing import take_turns

import moqa
from moqa.adjustment.drift import DEFAULT_THRESHOLD, INTERVAL, WINDOW, DriftDetector
from moqa.data import cut_windows, read_distributions
from moqa.format.routing import Routing, read_routing
from moqa.profiling import read_profile
from moqa.runtime.decoder import FusedDecoder
from moqa.runtime.routing import RoutingCounts

ROOT = Path(__file__).parents[1]
OUT, PROFILE = ROOT / "runs" / "adjust", ROOT / "runs" / "adjust" / "profile"
PAGE = ROOT / "docs" / "results" / "drift-detector.md"
MODEL, TEXT = ROOT / "reference" / "model", ROOT / "reference" / "text"
KNOWN, NOVEL = ("wiki", "novels"), ("python", "math", "german", "french")
CONTEXT, TOKENS, STRETCH, ORDERS = 1000, 20_000, 2000, 5
THRESHOLDS = (0.06, DEFAULT_THRESHOLD, 0.15)
BLOCK, ROUNDS = 64, 150


def checkpoint() -> Path:
    out = OUT / "drift-checkpoint"
    profile = read_profile(PROFILE)
    moqa.quantize(MODEL, moqa.plan(profile, "3bpw", known=KNOWN), out, overwrite=True, profile=profile, cache="full")
    return out


def routed(model: object, tokenizer: object) -> dict[str, np.ndarray]:
    """Of each text, [tokens, layers, experts] as native decoding counts them, token by token."""
    decoder, counts, found = FusedDecoder.of(model), RoutingCounts(model), {}
    assert decoder is not None
    counts.start()
    for name in (*KNOWN, *NOVEL):
        text = read_distributions([f"{name}={TEXT / f'{name}.test.txt'}"])[0]
        rows = []
        for window in cut_windows(text, tokenizer, CONTEXT, TOKENS // CONTEXT).inputs:
            cache = decoder.cache()
            model(window[None, :1], past_key_values=cache, use_cache=True)
            rows.append(counts.take())
            for token in window[1:].tolist():
                decoder.step(token, cache)
                rows.append(counts.take())
        found[name] = np.array(rows, np.int8)
        print(f"{name}: {len(rows)} tokens", flush=True)
    counts.stop()
    return found


def stream(routes: dict[str, np.ndarray], seed: int) -> list[tuple[str, np.ndarray]]:
    """Stretches of all texts in random order."""
    parts = [(n, rows[at : at + STRETCH]) for n, rows in routes.items() for at in range(0, TOKENS, STRETCH)]
    random.Random(seed).shuffle(parts)
    return parts


def judge(routing: Routing, routes: dict[str, np.ndarray], threshold: float) -> dict:
    """Delays and false alarms over all streams."""
    delays, returns, alarms, known_tokens, wrong, missed = [], [], 0, 0, 0, 0
    for seed in range(ORDERS):
        detector, before = DriftDetector(routing, threshold), None
        for name, rows in stream(routes, seed):
            known = name in KNOWN
            first, was = None, detector.state
            for at, counts in enumerate(rows, 1):
                state = detector.add(counts)
                if known:
                    # the memory of a novel stretch is no alarm: only entering is
                    alarms += state == "novel" != was
                    wrong += state == "novel"
                if first is None and (state == "novel") != known:
                    first = at
                was = state
            known_tokens += len(rows) * known
            if before is not None and before != known:
                missed += first is None
                (returns if known else delays).append(first or len(rows))
            before = known
    return {
        "threshold": threshold, "switches": len(delays), "delay": spread(delays), "return": spread(returns),
        "missed": missed, "false_alarms_per_10000": alarms * 1e4 / known_tokens, "known_tokens": known_tokens,
        "share_of_known_called_novel": wrong / known_tokens,
    }  # fmt: skip


def spread(tokens: list[int]) -> dict[str, float]:
    return {"median": statistics.median(tokens), "p95": float(np.percentile(tokens, 95)), "longest": max(tokens)}


def divergences(routing: Routing, routes: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """How far each text is from the known ones, once the memory holds nothing else."""
    found = {}
    for name, rows in routes.items():
        detector, values = DriftDetector(routing), []
        for at, counts in enumerate(rows):
            detector.add(counts)
            if at > 4 * WINDOW:
                values.append(detector.divergence)
        found[name] = {"median": statistics.median(values)} | {
            f"p{q}": float(np.percentile(values, q)) for q in (5, 95)
        }
    return found


def cost(folder: Path) -> dict:
    """Decoding with counts and detector, without, and without once more: what two equal ones differ by is noise."""
    routing = read_routing(folder, read_profile(PROFILE).record.fingerprint)
    ids = torch.arange(128)[None] + 500

    def contender(watched: bool) -> object:
        model, _ = moqa.load(folder, verify=False)
        decoder, counts, detector = FusedDecoder.of(model), RoutingCounts(model), DriftDetector(routing)
        cache = decoder.cache()
        model(ids, past_key_values=cache, use_cache=True)
        if watched:
            counts.start()

        def block(number: int) -> None:
            for token in range(BLOCK):
                decoder.step((number * BLOCK + token) * 7 % 8192, cache)
                if watched and token % INTERVAL == 0:
                    detector.add(counts.take())
            cache.crop(-BLOCK)

        return block

    names = {"watched": True, "not watched": False, "not watched, again": False}
    times = take_turns({name: contender(watched) for name, watched in names.items()}, rounds=ROUNDS, seconds=0.01)
    plain = times["not watched"]
    return {
        "microseconds_per_token": {name: value / BLOCK for name, value in times.items()},
        "share": times["watched"] / plain - 1, "noise": times["not watched, again"] / plain - 1,
    }  # fmt: skip


def page(found: dict) -> str:
    def cells(values: dict[str, float]) -> str:
        return f"{values['median']:.0f} / {values['p95']:.0f} / {values['longest']:.0f}"

    rows = "\n".join(
        f"| {r['threshold']:g} | {cells(r['delay'])} | {r['missed']} | {r['false_alarms_per_10000']:.2f} | "
        f"{r['share_of_known_called_novel']:.1%} | {cells(r['return'])} |"
        for r in found["thresholds"]
    )
    texts = "\n".join(
        f"| {n} | {'known' if n in KNOWN else 'novel'} | {d['median']:.3f} | {d['p5']:.3f} to {d['p95']:.3f} |"
        for n, d in found["divergences"].items()
    )
    paid, first = found["cost"], found["thresholds"][0]
    micros = paid["microseconds_per_token"]
    columns = (
        "threshold, bits", "delay: median / 95 % / longest", "not found", "false alarms per 10,000 known tokens",
        "known tokens called novel, returns included", "return: median / 95 % / longest",
    )  # fmt: skip
    return f"""# The drift detector

Command: `python benchmarks/drift_detector.py`, after `make demo`. Reference model at 3 bits per weight, quantized for
wiki and novels; python, math, german and french are novel. Held-out texts, {TOKENS:,} tokens each, decoded token by
token; {ORDERS} streams of all of them in stretches of {STRETCH:,} tokens in random order (fixed seeds), together
{first["switches"]} switches from known to novel text and {first["known_tokens"]:,} known tokens.
Memory of {WINDOW} tokens, judged every {INTERVAL}.

**Delay**: tokens from the switch to the state `novel`. **False alarm**: entering `novel` within known text.
**Return**: tokens until `novel` is left after a switch back. The default threshold is {DEFAULT_THRESHOLD}.

| {" | ".join(columns)} |
|{"---:|" * len(columns)}
{rows}

How far each text is from the closest mixture of the known ones, in bits, over memories that hold nothing else:

| text | | median | 5 to 95 % |
|---|---|---:|---:|
{texts}

**Cost**: {micros["watched"]:.0f} µs per decoded token with counters and detector, {micros["not watched"]:.0f} without:
{paid["share"]:+.1%}. Two models that are both not watched differ by {paid["noise"]:+.1%} in the same run (medians of
{ROUNDS} turns, one thread). The work grows with the number of experts and not with their size.

The false alarms are not sampling noise, which falls with the memory. The nine on 40,960 tokens of wiki at the default
threshold were read: links to other languages, the dump's XML, character codes, a proof in markup. 40,960 tokens of
novels give none. A higher threshold or a longer memory trades delay against them.
"""


def main() -> None:
    torch.set_num_threads(1)
    folder = checkpoint()
    model, tokenizer = moqa.load(folder)
    with torch.inference_mode():
        routes = routed(model, tokenizer)
    routing = read_routing(folder, read_profile(PROFILE).record.fingerprint)
    found = {
        "window": WINDOW, "stretch": STRETCH, "orders": ORDERS,
        "thresholds": [judge(routing, routes, threshold) for threshold in THRESHOLDS],
        "divergences": divergences(routing, routes), "cost": cost(folder),
    }  # fmt: skip
    (OUT / "drift.json").write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found), encoding="utf-8")
    print(page(found))


if __name__ == "__main__":
    main()
