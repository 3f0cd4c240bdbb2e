"""Generation: an own loop over a transformers model, text as it is written, conversations."""

from moqa.callable import callable_folder
from moqa.generate.chat import Chat, chat_prompt
from moqa.generate.load import load_any
from moqa.generate.loop import ContextError, Token, check_room, tokens
from moqa.generate.memory import Memory
from moqa.generate.run import Finish, Piece, encode, generate
from moqa.generate.sampling import Sampling

__all__ = [
    "Chat", "ContextError", "Finish", "Memory", "Piece", "Sampling", "Token", "chat_prompt", "check_room", "encode",
    "generate", "load_any", "tokens",
]  # fmt: skip

callable_folder(__name__, generate)
