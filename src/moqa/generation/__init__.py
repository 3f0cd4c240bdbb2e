"""Generation: moqa's own loop over a transformers model, streamed text, conversations."""

from moqa.generation.chat import Chat, chat_prompt
from moqa.generation.choice import Token
from moqa.generation.grammar import json_grammar
from moqa.generation.load import load_any
from moqa.generation.loop import ContextError, check_room, tokens
from moqa.generation.prompt_cache import PromptCache
from moqa.generation.run import Finish, Piece, begin_grammar, encode, generate
from moqa.generation.sampling import Sampling

__all__ = [
    "Chat",
    "ContextError",
    "Finish",
    "Piece",
    "PromptCache",
    "Sampling",
    "Token",
    "begin_grammar",
    "chat_prompt",
    "check_room",
    "encode",
    "generate",
    "json_grammar",
    "load_any",
    "tokens",
]  # fmt: skip
