"""Text that follows a grammar: which tokens may come next, by the library llguidance."""

import json
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from moqa.errors import MoqaError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEPT = 16  # compiled grammars per tokenizer
# without a limit, a model that is unsure what comes next writes spaces for ever
_SPACES = r"[ \n]{0,16}"
_COMPILERS: "WeakKeyDictionary[PreTrainedTokenizerBase, Callable[[str], Any]]" = WeakKeyDictionary()


def json_grammar(schema: Any) -> str:
    """The grammar of a JSON value.

    >>> json_grammar({"type": "integer"})[:31]
    'start: %json {"type": "integer"'

    Args:
        schema: a JSON schema that is an object.
    """
    return f"start: %json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': _SPACES}})}"


class Grammar:
    """Where a text is in its grammar.

    >>> grammar = Grammar.of('start: "yes" | "no"', tokenizer, vocabulary=8192, ends=[0])
    >>> tokenizer.decode(grammar.allowed().nonzero()[:, 0])
    'nyyeyesno'

    Args:
        matcher: of llguidance.
        vocabulary: number of logits.
    """

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    @classmethod
    def of(cls, grammar: str, tokenizer: "PreTrainedTokenizerBase", vocabulary: int, ends: list[int]) -> "Grammar":
        """The beginning of a grammar; compiled grammars are kept.

        Args:
            grammar: in Lark's or GBNF's notation.
            tokenizer: of the model.
            vocabulary: number of logits.
            ends: tokens that end a text.

        Raises:
            MoqaError: if the grammar is none, or llguidance is missing or cannot use the tokenizer.
        """
        compile_ = _COMPILERS.get(tokenizer)
        if compile_ is None:
            compile_ = _COMPILERS[tokenizer] = _compiler(tokenizer, vocabulary, ends)
        return cls(compile_(grammar).deep_copy(), vocabulary)

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> Tensor:
        """[vocabulary] whether each token may come next, boolean."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocabulary]).bool()

    def follow(self, token: int) -> None:
        """Go on by one token.

        Raises:
            MoqaError: if the grammar takes more than llguidance's limits allow.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise MoqaError(
                "the grammar cannot be followed any further", one_line(ValueError(self._matcher.get_error()))
            )


def _compiler(tokenizer: "PreTrainedTokenizerBase", vocabulary: int, ends: list[int]) -> Callable[[str], Any]:
    """Makes matchers of grammars; takes about a second for a large vocabulary."""
    try:
        from llguidance import LLMatcher
        from llguidance.gbnf_to_lark import any_to_lark
        from llguidance.hf import from_tokenizer
    except ModuleNotFoundError:
        raise MoqaError("grammars and JSON schemas need `pip install 'moqa[serve]'`", "llguidance is missing") from None
    try:
        known = from_tokenizer(tokenizer, max(vocabulary, len(tokenizer)), ends or None)
    except Exception as error:  # llguidance raises many kinds of errors for tokenizers that it does not know
        raise MoqaError("the model's tokenizer does not work with grammars", one_line(error)) from None

    @lru_cache(_KEPT)
    def compile_(grammar: str) -> Any:
        try:
            matcher = LLMatcher(known, any_to_lark(grammar), log_level=0)
        except Exception as error:  # the parser of GBNF raises many kinds, and recurses
            raise MoqaError("the grammar cannot be read", one_line(error)) from None
        if matcher.is_error():
            raise MoqaError("the grammar cannot be used", one_line(ValueError(matcher.get_error())))
        return matcher

    return compile_
