"""Conversations: the prompt for a list of messages, and a chat that continues turn by turn."""

import inspect
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moqa.data.chat import chat_text, template_of
from moqa.errors import MoqaError
from moqa.generation.loop import check_room
from moqa.generation.prompt_cache import PromptCache
from moqa.generation.run import Piece, encode, generate
from moqa.generation.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message = Mapping[str, Any]  # role and content, and what else a template may read

# Without a chat template, only these strings stop a model from writing the user's next line as well.
PLAIN_STOPS = ("\nuser:", "\nsystem:")
_ANSWER = "assistant:"


def chat_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    variables: Mapping[str, Any] | None = None,
    context: int | None = None,
) -> tuple[list[int], tuple[str, ...]]:
    """Make the prompt for a conversation, and the strings that end the answer.

    >>> chat_prompt(tokenizer, [{"role": "user", "content": "Hello"}])[1]
    ('\\nuser:', '\\nsystem:')

    Args:
        tokenizer: its chat template is used; without a template, each message becomes a line `role: content`.
        messages: each with a role and a content.
        tools: functions that the model may call, as in OpenAI's API; only a template can describe them.
        variables: further variables of the template, e.g. `enable_thinking`.
        context: as in `encode`.

    Returns:
        Tokens up to the beginning of the answer, and additional stop strings.

    Raises:
        MoqaError: if there is no message, or the template cannot say what is given or refuses it, or it is surely too
            long.
    """
    text, stops = _render(tokenizer, messages, tools, variables or {})
    # templates add special tokens themselves
    return encode(tokenizer, text, special=tokenizer.chat_template is None, context=context), stops


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    variables: Mapping[str, Any] = {},
) -> tuple[str, tuple[str, ...]]:
    if not messages:
        raise MoqaError("the conversation has no messages", "give at least one")
    if tools and "tools" not in template_of(tokenizer, tools=True):
        raise MoqaError("the model's chat template has no place for tools", "leave them out")
    if tokenizer.chat_template is None:
        if any(message.get("tool_calls") for message in messages):
            raise MoqaError("the model has no chat template, which tool calls need", "leave them out")
        return "".join(map(_line, messages)) + _ANSWER, PLAIN_STOPS
    # such a name would be an option of transformers, and could even be another template
    reserved = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages", "answer"}
    for name in reserved & variables.keys():
        raise MoqaError(f"{name} is no variable of a chat template", "leave it out")
    return chat_text(tokenizer, messages, answer=True, tools=list(tools) or None, **variables), ()


def _line(message: Message) -> str:
    # an answer that the model wrote may begin with its own space
    space = "" if message["content"][:1].isspace() else " "
    return f"{message['role']}:{space}{message['content']}\n"


class Chat:
    """A conversation in which every turn reads only the new tokens.

    >>> chat = Chat(model, tokenizer, Sampling(max_tokens=8))
    >>> answer = "".join(piece.text for piece in chat.say("Hello"))
    >>> chat.messages[-1]["content"] == answer
    True
    """

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", sampling: Sampling) -> None:
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._memory = PromptCache()
        self.reset()

    def say(self, message: str) -> Generator[Piece, None, None]:
        """Answer a message; if the answer is not read to its end, the part that was read stays in the conversation.

        Args:
            message: text of the user.

        Returns:
            Pieces as from `generate`; the answer is cut where the context ends.

        Raises:
            MoqaError: if the conversation is longer than the context; this turn is then not added to it.
        """
        messages = [*self.messages, {"role": "user", "content": message}]
        text, ids, stops = self._prompt(messages)
        room = check_room(self._model, ids, self._sampling.model_copy(update={"max_tokens": None}))
        limit = min(self._sampling.max_tokens or room, room)
        # every turn has its own seed: with the same seed, answers tend to begin in the same way
        seed = None if self._sampling.seed is None else self._sampling.seed + len(self.messages)
        changes = {"max_tokens": limit, "seed": seed, "stop": self._sampling.stop + stops}
        sampling = self._sampling.model_copy(update=changes)
        pieces = generate(self._model, self._tokenizer, ids, sampling, memory=self._memory)
        answer: list[Piece] = []
        try:
            for piece in pieces:
                answer.append(piece)
                yield piece
        finally:
            self._said(messages, text, ids, answer)

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages: list[Message] = []
        self._text, self._ids = "", list[int]()
        self._memory.clear()

    def _prompt(self, messages: Sequence[Message]) -> tuple[str, list[int], tuple[str, ...]]:
        """Text and tokens of a conversation; earlier turns keep their tokens if their text is unchanged."""
        text, stops = _render(self._tokenizer, messages)
        if self._text and self._tokenizer.chat_template is None:
            # the answer as the model wrote it, which may not begin with a space
            text = f"{self._text}\n{_line(messages[-1])}{_ANSWER}"
        if self._text and text.startswith(self._text):
            return text, self._ids + encode(self._tokenizer, text[len(self._text) :], special=False), stops
        return text, chat_prompt(self._tokenizer, messages)[0], stops

    def _said(self, messages: list[Message], text: str, ids: list[int], pieces: Sequence[Piece]) -> None:
        answer = "".join(piece.text for piece in pieces)
        written = [token.id for piece in pieces for token, _ in piece.tokens]
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        # the tokens are not reused if a stop string begins inside a token
        whole = self._tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False) == answer
        self._text, self._ids = (text + answer, ids + written) if whole else ("", [])
