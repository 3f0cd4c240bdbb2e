"""docs/results/engines.md from runs/engines/summary.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "results" / "engines.md"
TEXT = """# Engines

Made by `make engines-study` (`benchmarks/engines_study.py`) on the reference model. Bits are stored bits of the layers'
matrices; embedding and head keep 16 bits everywhere. Fitted on windows of wiki and novels, measured on held-out
windows of these (known) and of python, math, german and french (novel), {windows} of 256 tokens per text: KL divergence
from the original in nats, of the weights in the files.

## What ties cost
At the bytes of one of llama-quantize's own mixes each: default plans for moqa's own runtime (integers and trellis, by
gptq), which differ in their ties alone, and plans for llama.cpp and vLLM with the schemes that these run. A dash is
not measured; vLLM has nothing below 4 bits.

{ties}
A plan with coarser ties is solved with them, and never a finer one rounded. In ggml's types, `layer_projection`
costs more than the ties alone: they are rounded without the feedback of errors that gptq has. The row of vLLM is of
the folder that vLLM alone reads; with moqa as its plug-in it serves the checkpoints of all rows of moqa.

## llama.cpp
llama-quantize's own mixes, with the importance matrix that moqa exports from the same windows (`--to imatrix`), and
moqa's plans of at most their bytes in ggml's types. Logits: the largest difference between llama.cpp's own, after a
prompt of 128 tokens, and those of the file's weights in 32 bits; llama.cpp also rounds activations to 8 bits. Speed:
tokens per second of decoding on one thread, as one run had it.

{llama}

The same mixes with the importance matrix that `llama-imatrix` makes of the text of the same windows:

{importance}

## vLLM with moqa's plug-in
A checkpoint with ties `unit` at the most bits above, in groups of 64 and 128 that two processes can divide, served by
vLLM {vllm} on the CPU in bfloat16, not compiled: the largest difference between its logits after a prompt of 128 tokens
and those of the file's weights in 32 bits, and tokens per second of decoding, with one thread for each process. Where
vLLM computes in 32 bits, greedy tokens are those of moqa's own runtime up to ties, compiled and not compiled, in one
process and two (`make test-vllm`).

{served}

{requests} requests at once, of 32 tokens each with 32 to write, on a random model of 441 M parameters, one thread:
tokens after the first of each, per second and per second of the processor in vLLM's processes. Other work shared the
machine while all of this page was measured, so seconds on the clock are rough.

{speed}
"""
_ENGINES = {"unit": "moqa, `unit`", "expert": "moqa, `expert`", "layer_projection": "moqa, `layer_projection`",
            "layer": "moqa, `layer`", "plan": "llama.cpp, `layer_projection`", "vllm": "vLLM, `layer`"}  # fmt: skip

_PARALLEL = {"1": "1", "tp2": "2, tensor-parallel", "ep2": "2, expert-parallel"}
_FORMATS = {"bfloat16": "bfloat16", "packed": "packed, widths 2 to 4 in turns"}


def write(rows: Sequence[dict]) -> None:
    """Write the page."""
    served = [row for row in rows if row["setting"].startswith("served")]
    speed = {row["format"]: row for row in rows if row["setting"].startswith("requests")}
    text = TEXT if served and len(speed) == len(_FORMATS) else TEXT[: TEXT.index("\n## vLLM")]
    any_row, first = next(iter(speed.values()), {}), next(iter(served), {})
    PAGE.write_text(text.format(
        ties=_ties(rows), llama=_llama(rows), importance=_importance(rows), windows=rows[0]["windows"],
        vllm=first.get("version"), served=_served(served), requests=any_row.get("requests"), speed=_speed(speed),
    ))  # fmt: skip


def _by_setting(rows: Sequence[dict]) -> dict[tuple[str, str], dict]:
    return {(row["setting"].split()[0], row["setting"].split()[-1]): row for row in rows}


def _ties(rows: Sequence[dict]) -> str:
    found = _by_setting(rows)
    mixes = [mix for kind, mix in found if kind == "llama-quantize"]
    heads = [f"{found['llama-quantize', mix]['bits_per_weight']:.2f} bits" for mix in mixes]
    lines = [f"| engine, ties | {' | '.join(heads)} |", "|---|" + "---|" * len(mixes)]
    for kind, title in _ENGINES.items():
        cells = [_kl(found[kind, mix]) if (kind, mix) in found else "-" for mix in mixes]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _llama(rows: Sequence[dict]) -> str:
    found = _by_setting(rows)
    lines = ["| mix | bits, theirs | ours | KL known / novel, theirs | ours | less by | logits, theirs | ours | "
             "tokens/s, theirs | ours |", "|---|" + "---:|" * 9]  # fmt: skip
    for mix in [mix for kind, mix in found if kind == "llama-quantize"]:
        theirs, ours = found["llama-quantize", mix], found.get(("plan", mix))
        if ours is not None:
            less = [1 - ours[key] / theirs[key] for key in ("kl_known", "kl_novel")]
            pairs = [
                *(f"{row['bits_per_weight']:.3f}" for row in (theirs, ours)), *(_kl(row) for row in (theirs, ours)),
                " / ".join(f"{share:.0%}" for share in less),
                *(f"{row['max_logit_difference']:.2f}" for row in (theirs, ours)),
                *(f"{row['decode_tokens_per_second']:.0f}" for row in (theirs, ours)),
            ]  # fmt: skip
            lines.append(f"| {mix} | {' | '.join(pairs)} |")
    return "\n".join(lines)


def _importance(rows: Sequence[dict]) -> str:
    found = _by_setting(rows)
    lines = ["| mix | of `moqa export --to imatrix`, KL known / novel | of `llama-imatrix` |", "|---|---:|---:|"]
    for kind, mix in found:
        if kind == "llama-imatrix":
            lines.append(f"| {mix} | {_kl(found['llama-quantize', mix])} | {_kl(found[kind, mix])} |")
    return "\n".join(lines)


def _served(rows: Sequence[dict]) -> str:
    lines = ["| processes | bits | KL known / novel | logits | tokens/s |", "|---|" + "---:|" * 4]
    for row in sorted(rows, key=lambda row: list(_PARALLEL).index(row["parallel"])):
        numbers = f"{row['max_logit_difference']:.2f} | {row['decode_tokens_per_second']:.0f}"
        lines.append(f"| {_PARALLEL[row['parallel']]} | {row['bits_per_weight']:.3f} | {_kl(row)} | {numbers} |")
    return "\n".join(lines)


def _speed(rows: Mapping[str, dict]) -> str:
    lines = ["| weights | bits | files, MB | tokens/s | x | tokens per processor second | x |", "|---|" + "---:|" * 6]
    for kind, title in _FORMATS.items():
        if kind in rows:
            row = rows[kind]
            numbers = [f"{row['bits_per_weight']:.2f}", f"{row['bytes'] / 1e6:.0f}"]
            for clock in ("decode_tokens_per_second", "tokens_per_processor_second"):
                numbers += [f"{row[clock]:.1f}", f"{row[clock] / rows['bfloat16'][clock]:.2f}"]
            lines.append(f"| {title} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def _kl(row: dict) -> str:
    return f"{row['kl_known']:.4f} / {row['kl_novel']:.4f}"
