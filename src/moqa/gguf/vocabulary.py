"""A tokenizer in a GGUF file: its tokens, merges, how it cuts text into words, and its chat template."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moqa.errors import MoqaError
from moqa.storage.files import read_object

if TYPE_CHECKING:
    from gguf import GGUFWriter

_FILE = "tokenizer.json"
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# how words are cut, as a regular expression -> llama.cpp's name of it; None is the expression of GPT-2
_WORDS = {None: "gpt-2", _SPLIT % r"\p{N}": "qwen2", _SPLIT % r"\p{N}{1,3}": "llama-bpe"}
_UNUSED = "[PAD{}]"


def write_vocabulary(writer: "GGUFWriter", folder: Path, size: int) -> None:
    """Add a model's tokenizer.

    Args:
        writer: of the file.
        folder: of the model.
        size: rows of its embedding; tokens that the tokenizer lacks are filled up.

    Raises:
        MoqaError: if it is of a kind that moqa does not write.
    """
    from gguf import SpecialVocab, TokenType

    data = read_object(folder / _FILE)
    pre = _pre_tokenizer(data, folder)
    tokens = {number: token for token, number in data["model"]["vocab"].items()}
    added = {token["id"]: token for token in data.get("added_tokens") or ()}
    tokens |= {number: token["content"] for number, token in added.items()}
    if tokens and max(tokens) >= size:
        raise MoqaError(f"{folder / _FILE} has token {max(tokens)}", f"the model has {size}")
    kinds = []
    for number in range(size):
        if number not in tokens:
            kinds.append(TokenType.UNUSED)
        elif number in added:
            kinds.append(TokenType.CONTROL if added[number].get("special") else TokenType.USER_DEFINED)
        else:
            kinds.append(TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokens.get(number, _UNUSED.format(number)) for number in range(size)])
    writer.add_token_types(kinds)
    special = SpecialVocab(folder, load_merges=True, n_vocab=size)
    # where the tokenizer says nothing, it adds none: llama.cpp would choose by itself
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)


def _pre_tokenizer(data: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name of the way in which a tokenizer cuts text into words."""
    model = data.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise _refused(folder, "is no byte-level BPE")
    normalizer = (data.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp does not normalize; NFC changes no usual text
        raise _refused(folder, f"normalizes by {normalizer}")
    steps = data.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return _WORDS[None]
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        expression = (steps[0].get("pattern") or {}).get("Regex")
        if expression in _WORDS:
            return _WORDS[expression]
    raise _refused(folder, "cuts words in another way")


def _refused(folder: Path, why: str) -> MoqaError:
    known = ", ".join(_WORDS.values())
    return MoqaError(f"the tokenizer of {folder} {why}", f"byte-level BPE as in {known} can be written for llama.cpp")
