"""Token windows of a distribution, and its two splits."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from moqa.data.overlap import shingles
from moqa.data.source import Distribution
from moqa.data.spacing import evenly_spaced
from moqa.errors import MoqaError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_BATCH = 256  # documents tokenized at a time


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows cut from one distribution."""

    name: str
    inputs: Tensor  # [windows, context] token ids, int64
    text_bytes: int  # UTF-8 bytes that the predicted tokens (all but the first of each window) stand for
    hashes: np.ndarray  # [hashes] uint64, sorted and unique: content hashes of the text in these windows


def cut_windows(
    distribution: Distribution,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    count: int | None = None,
    seed: int = 0,
) -> Windows:
    """Cut a distribution into windows of tokens that do not overlap, each beginning as a prompt does.

    >>> cut_windows(wiki, tokenizer, context=256, count=32).inputs.shape
    torch.Size([32, 256])

    Args:
        distribution: its documents are joined by the tokenizer's end-of-text token, if it has one, which counts as
            0 bytes of text; the tokens after the last full window are dropped.
        tokenizer: a fast tokenizer of transformers. If it begins a prompt with a special token, so does each window.
        context: tokens in a window.
        count: number of windows to take, evenly spaced; all of them if None or more than there are.
        seed: shifts which evenly spaced windows are taken; 0 starts with the first.

    Raises:
        MoqaError: if there is less than one full window, or the tokenizer returns no offsets.
    """
    import torch

    if context < 2:
        raise MoqaError(f"--context {context} leaves no token to predict", "give 2 or more")
    if count is not None and count < 1:
        raise MoqaError(f"{count} windows of {distribution.name} leave nothing to read", "take 1 or more")
    if not tokenizer.is_fast:
        raise MoqaError(f"the tokenizer {tokenizer.name_or_path} returns no offsets", "use one with a tokenizer.json")
    start = np.array(prompt_start(tokenizer), np.int64)
    tokens, begins, ends = _token_stream(distribution, tokenizer, start)
    step = context - len(start)
    available = len(tokens) // step if step > 0 else 0
    if available == 0:
        raise MoqaError(
            f"{distribution.name}={distribution.origin} holds {len(tokens)} tokens",
            f"one window of --context {context} needs at least {step}",
        )
    chosen = evenly_spaced(available, available if count is None else min(count, available), seed)
    firsts, lasts = chosen * step, (chosen + 1) * step - 1
    bytes_before = _bytes_before(distribution.texts)
    predicted = firsts if len(start) else firsts + 1
    text_bytes = int((bytes_before[ends[lasts]] - bytes_before[begins[predicted]]).sum())
    body = tokens[: available * step].reshape(available, step)[chosen]
    text = "\n".join(distribution.texts)
    # Adjacent windows are hashed as one text, so that the shingles across their border are not missed.
    gaps = np.flatnonzero(np.diff(chosen) > 1)
    runs = zip(firsts[np.r_[0, gaps + 1]], lasts[np.r_[gaps, len(chosen) - 1]], strict=True)
    return Windows(
        name=distribution.name,
        inputs=torch.from_numpy(np.hstack([np.tile(start, (len(chosen), 1)), body])),
        text_bytes=text_bytes,
        hashes=shingles(text[begins[first] : ends[last]] for first, last in runs),
    )


def prompt_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that the tokenizer puts in front of every prompt: usually one or none.

    >>> prompt_start(tokenizer)
    []
    """
    whole, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return whole[: next((k for k in range(len(whole)) if whole[k : k + len(plain)] == plain), 0)]


def split_held_out(distribution: Distribution, share: float = 0.2) -> tuple[Distribution, Distribution]:
    """Cut a distribution into a calibration split and a held-out split, its tail.

    >>> calibration, held_out = split_held_out(wiki, share=0.1)
    >>> held_out.name
    'wiki'

    The cut is at the nearest border between documents, if that changes the smaller split by at most half. Otherwise it
    is inside a document, at a newline or space if one is near.

    Args:
        distribution: both splits keep its name and origin.
        share: share of the characters to hold out, between 0 and 1.

    Raises:
        MoqaError: if either split would hold no text.
    """
    if not 0 < share < 1:
        raise MoqaError(f"a held-out share of {share} leaves one split empty", "give a number between 0 and 1")
    borders = list(itertools.accumulate(map(len, distribution.texts), initial=0))
    target = round(borders[-1] * (1 - share))
    nearest = min(range(len(borders)), key=lambda index: abs(borders[index] - target))
    if abs(borders[nearest] - target) <= min(share, 1 - share) / 2 * borders[-1]:
        sides = distribution.texts[:nearest], distribution.texts[nearest:]
    else:
        index = next(index for index, border in enumerate(borders[1:]) if border > target)
        cut_text = distribution.texts[index]
        cut = _nearest_break(cut_text, target - borders[index])
        sides = (
            (*distribution.texts[:index], cut_text[:cut]),
            (cut_text[cut:], *distribution.texts[index + 1 :]),
        )
    if not all(any(text.strip() for text in side) for side in sides):
        raise MoqaError(
            f"{distribution.name}={distribution.origin} is too short to hold out {share:.0%}",
            f"it has {borders[-1]} characters: give more text, or a separate source for evaluation",
        )
    return replace(distribution, texts=sides[0]), replace(distribution, texts=sides[1])


def _nearest_break(text: str, target: int) -> int:
    """Where to cut near `target`: after a newline within 5 % of the text, else a space within 25 %, else there."""
    for pattern, reach in (("\n", len(text) // 20), (r"\s", len(text) // 4)):
        begin = max(target - reach, 0)
        breaks = [begin + match.end() for match in re.finditer(pattern, text[begin : target + reach])]
        inside = [cut for cut in breaks if 0 < cut < len(text)]
        if inside:
            return min(inside, key=lambda cut: abs(cut - target))
    return target


def _token_stream(
    distribution: Distribution, tokenizer: PreTrainedTokenizerBase, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of all documents, and where each begins and ends in the documents joined by one character.

    A document that begins with the tokens of `start`, as chat templates write them, loses them: they begin windows.

    Returns:
        [tokens] ids, [tokens] first character, [tokens] character after the last; all int64. The end-of-text token
        covers the joining character.
    """
    parts: list[np.ndarray] = []  # each [3, tokens]
    base = 0
    for done in range(0, len(distribution.texts), _BATCH):
        batch = list(distribution.texts[done : done + _BATCH])
        encoded = tokenizer(batch, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for text, ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if base and tokenizer.eos_token_id is not None:
                parts.append(np.array([[tokenizer.eos_token_id], [base - 1], [base]]))
            skipped = len(start) if ids[: len(start)] == start.tolist() else 0
            ids, spans = ids[skipped:], np.array(offsets, np.int64).reshape(-1, 2)[skipped:]
            # Some tokenizers leave spaces out of the offsets: they belong to the token after them.
            begins = np.minimum(spans[:, 0], np.r_[0, spans[:-1, 1]][: len(spans)])
            parts.append(np.stack([np.array(ids, np.int64), base + begins, base + spans[:, 1]]))
            base += len(text) + 1
    tokens, begins, ends = np.concatenate(parts, axis=1) if parts else np.empty((3, 0), np.int64)
    return tokens, begins, ends


def _bytes_before(texts: tuple[str, ...]) -> np.ndarray:
    """[characters + 1] UTF-8 bytes before each character of the texts joined by one character of 0 bytes, int64."""
    code_points = np.frombuffer("\0".join(texts).encode("utf-32-le"), np.uint32)
    widths = np.ones(len(code_points), np.int64)
    for first in (0x80, 0x800, 0x10000):
        widths += code_points >= first
    widths[np.cumsum([len(text) + 1 for text in texts[:-1]], dtype=np.int64) - 1] = 0
    return np.concatenate([[0], np.cumsum(widths)])
