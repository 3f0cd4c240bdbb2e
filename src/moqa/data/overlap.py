"""Content hashes of texts, so that no evaluation runs on text that a fitting step has seen."""

import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from moqa.errors import MoqaError

SHINGLE = 200  # bytes
SAMPLING = 64  # one shingle in this many is kept
# Disjoint texts of one kind share boilerplate: the two reference splits of Python code 4.2 %, all others below 0.1 %.
MAX_OVERLAP = 0.045
CHUNK = 1 << 20  # characters hashed at a time

_BASE = 0x9E3779B97F4A7C15  # odd, so that no byte of a shingle is shifted out of the 64 bits
_WHITESPACE = re.compile(r"\s+")


def shingles(texts: Iterable[str]) -> np.ndarray:
    """Content hashes of texts, independent of how they are cut into windows.

    >>> text = Path("wiki.txt").read_text()
    >>> overlap_share(shingles([text[5000:9000]]), shingles([text]))
    1.0

    Every run of 200 bytes is hashed, and the hashes that are multiples of 64 are kept. Which ones are kept depends on
    the content alone, so two cuts of a text keep the same. Runs of whitespace count as one space.

    Args:
        texts: each is hashed on its own; one shorter than 200 bytes has no hash.

    Returns:
        [hashes] sorted and unique, uint64; about one for every 64 bytes.
    """
    kept = [_sampled_hashes(block) for text in texts for block in _blocks(text)]
    return np.unique(np.concatenate(kept)) if kept else np.empty(0, np.uint64)


def overlap_share(evaluated: np.ndarray, fitted: np.ndarray) -> float:
    """Share of the evaluated text's hashes that the fitted text also has.

    >>> overlap_share(np.array([1, 2, 3, 4], np.uint64), np.array([2, 9], np.uint64))
    0.25

    Args:
        evaluated: [hashes] of `shingles`, uint64; if there are none, the share is 0.
        fitted: [hashes] of `shingles`, uint64.
    """
    return float(np.isin(evaluated, fitted).mean()) if len(evaluated) else 0.0


def refuse_overlap(name: str, evaluated: np.ndarray, fitted: Mapping[str, np.ndarray]) -> None:
    """Stop an evaluation on text that was fitted on.

    >>> texts = {name: Path(f"{name}.txt").read_text() for name in ("wiki", "novels")}
    >>> refuse_overlap("novels", shingles([texts["novels"]]), {"wiki": shingles([texts["wiki"]])})

    Args:
        name: the evaluated distribution.
        evaluated: [hashes] of its text, uint64.
        fitted: name of each distribution that a fitting step saw -> [hashes] of its text, uint64.

    Raises:
        MoqaError: if more than MAX_OVERLAP of the evaluated text is in the fitted texts taken together.
    """
    if not fitted:
        return
    share = overlap_share(evaluated, np.concatenate(list(fitted.values())))
    if share > MAX_OVERLAP:
        shares = {other: overlap_share(evaluated, hashes) for other, hashes in fitted.items()}
        found = ", ".join(
            f"{shares[other]:.1%} in {other}" for other in sorted(shares, key=lambda n: -shares[n]) if shares[other]
        )
        raise MoqaError(
            f"{share:.1%} of the text of {name} was already fitted on ({found})",
            f"evaluate on held-out text, which shares at most {MAX_OVERLAP:.1%}",
        )


def _blocks(text: str) -> Iterator[np.ndarray]:
    """The bytes of a text with whitespace collapsed, in blocks that overlap by all but one byte of a shingle."""
    carry = b""
    for start in range(0, len(text), CHUNK):
        piece = _WHITESPACE.sub(" ", text[start : start + CHUNK])
        if start and text[start - 1].isspace():
            piece = piece.removeprefix(" ")
        block = carry + piece.encode()
        if len(block) >= SHINGLE:
            yield np.frombuffer(block, np.uint8)
        carry = block[-(SHINGLE - 1) :]


def _sampled_hashes(block: np.ndarray) -> np.ndarray:
    """The kept hashes of all shingles of a block of [bytes] uint8, by doubling the hashed length."""
    power, length, done = _BASE, 1, 0
    runs = block.astype(np.uint64) + np.uint64(1)  # hash of the `length` bytes from each position
    hashes = np.zeros(len(block) - SHINGLE + 1, np.uint64)
    while True:
        if SHINGLE & length:
            hashes = hashes * np.uint64(power) + runs[done : done + len(hashes)]
            done += length
        if 2 * length > SHINGLE:
            break
        runs = runs[:-length] * np.uint64(power) + runs[length:]
        power, length = power * power % 2**64, 2 * length
    hashes = _mixed(hashes)
    return hashes[hashes % np.uint64(SAMPLING) == 0]


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """Splitmix64's final mix: the low bits, by which hashes are sampled, then depend on every byte."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))
