"""A tokenizer in a GGUF file: its tokens, how it cuts text into words and joins them, and its chat template."""

import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moqa.errors import MoqaError
from moqa.storage.files import read_object

if TYPE_CHECKING:
    from gguf import GGUFWriter, TokenType

_FILE = "tokenizer.json"
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# how words are cut, as a regular expression -> llama.cpp's name of it; None is the expression of GPT-2
_WORDS = {None: "gpt-2", _SPLIT % r"\p{N}": "qwen2", _SPLIT % r"\p{N}{1,3}": "llama-bpe"}
_DIGITS = "smollm"  # GPT-2's expression, and every digit by itself
_UNUSED = "[PAD{}]"
_SPACE = "▁"
# what comes before merges where spaces are parts of tokens -> whether a text gets a space in front
_SPACES = {
    (("Prepend", _SPACE), ("Replace", " ", _SPACE)): True,
    (("Replace", " ", _SPACE),): False,
    (("Metaspace", _SPACE, "always", False),): True,
    (("Metaspace", _SPACE, "first", False),): True,
    (("Metaspace", _SPACE, "never", False),): False,
}


def write_vocabulary(writer: "GGUFWriter", folder: Path, size: int) -> None:
    """Add a model's tokenizer.

    Args:
        writer: of the file.
        folder: of the model.
        size: rows of its embedding; tokens that the tokenizer lacks are filled up.

    Raises:
        MoqaError: if it is of a kind that moqa does not write.
    """
    from gguf import SpecialVocab

    data = read_object(folder / _FILE)
    model = data.get("model") or {}
    if model.get("type") != "BPE":
        raise _refused(folder, "is no BPE")
    # unknown characters are bytes, as SentencePiece writes them (Llama 2, Mixtral), or all text is (GPT-2 and later)
    falls_back = bool(model.get("byte_fallback"))
    if falls_back:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_space_in_front(data, folder))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(data, folder))
    named = {number: token for token, number in model["vocab"].items()}
    named |= {token["id"]: token["content"] for token in data.get("added_tokens") or ()}
    if named and max(named) >= size:
        raise MoqaError(f"{folder / _FILE} has token {max(named)}", f"the model has {size}")
    tokens = [named.get(number, _UNUSED.format(number)) for number in range(size)]
    writer.add_token_list(tokens)
    if falls_back:
        writer.add_token_scores(_scores(model["merges"], tokens))
    writer.add_token_types(_types(data, tokens, named.keys()))
    special = SpecialVocab(folder, load_merges=not falls_back, n_vocab=size)
    # where the tokenizer says nothing, it adds none: llama.cpp would choose by itself
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)


def _types(data: dict[str, Any], tokens: Sequence[str], used: Container[int]) -> "list[TokenType]":
    """What each token is."""
    from gguf import TokenType

    added = {token["id"]: token for token in data.get("added_tokens") or ()}
    model = data["model"]

    def of(number: int, token: str) -> TokenType:
        if number not in used:
            return TokenType.UNUSED
        if model.get("byte_fallback"):
            if token == model.get("unk_token"):
                return TokenType.UNKNOWN
            if re.fullmatch("<0x[0-9A-F]{2}>", token):
                return TokenType.BYTE
        if number in added:
            return TokenType.CONTROL if added[number].get("special") else TokenType.USER_DEFINED
        return TokenType.NORMAL

    return [of(number, token) for number, token in enumerate(tokens)]


def _scores(merges: Sequence[str | Sequence[str]], tokens: Sequence[str]) -> list[float]:
    """Scores by which llama.cpp joins neighbours, the highest first: those that are merged first."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        # tokens hold no spaces here, so that one parts the two
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def _space_in_front(data: dict[str, Any], folder: Path) -> bool:
    """Whether a text gets a space in front."""
    steps = tuple(map(_described, [*_steps(data, "normalizer"), *_steps(data, "pre_tokenizer")]))
    if steps not in _SPACES:
        raise _refused(folder, "treats spaces in another way")
    return _SPACES[steps]


def _described(step: dict[str, Any]) -> tuple[Any, ...]:
    kind = step.get("type")
    if kind == "Prepend":
        return kind, step.get("prepend")
    if kind == "Replace":
        return kind, (step.get("pattern") or {}).get("String"), step.get("content")
    if kind == "Metaspace":
        return kind, step.get("replacement"), step.get("prepend_scheme", "always"), step.get("split", True)
    return (kind,)


def _steps(data: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or of a pre-tokenizer."""
    found = data.get(name)
    if not found:
        return []
    return found[f"{name.replace('_', '')}s"] if found.get("type") == "Sequence" else [found]


def _pre_tokenizer(data: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name of the way in which a tokenizer of bytes cuts text into words."""
    for step in _steps(data, "normalizer"):
        if step.get("type") != "NFC":  # llama.cpp does not normalize; NFC changes no usual text
            raise _refused(folder, f"normalizes by {step.get('type')}")
    steps = _steps(data, "pre_tokenizer")
    kinds = [step.get("type") for step in steps]
    by_gpt2 = bool(steps) and steps[-1].get("use_regex", True) and not steps[-1].get("add_prefix_space")
    if kinds == ["ByteLevel"] and by_gpt2:
        return _WORDS[None]
    if kinds == ["Digits", "ByteLevel"] and by_gpt2 and steps[0].get("individual_digits"):
        return _DIGITS
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        expression = (steps[0].get("pattern") or {}).get("Regex")
        if expression in _WORDS:
            return _WORDS[expression]
    raise _refused(folder, "cuts words in another way")


def _refused(folder: Path, why: str) -> MoqaError:
    known = ", ".join([*_WORDS.values(), _DIGITS])
    return MoqaError(
        f"the tokenizer of {folder} {why}", f"BPE of bytes as in {known}, or of SentencePiece, can be written"
    )
