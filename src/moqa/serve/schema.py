"""Request bodies: the fields of OpenAI's API that are supported; fields that would be ignored are refused."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)  # fmt: skip

from moqa.generation.sampling import Sampling, first_problem
from moqa.serve.refusal import RefusalError

_T = TypeVar("_T")
# without fail_fast, a million numbers would produce a million errors of the branch for texts
_Many = Annotated[list[_T], Field(min_length=1, fail_fast=True)]
_MOST_FIELDS = 100  # of one object; there is an error for each unknown one
_MOST_STOPS = 16
_MOST = 4096  # prompts, messages, and parts of a message
_Prompts = Annotated[list[_T], Field(min_length=1, max_length=_MOST, fail_fast=True)]
# these have no effect on any text
_IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
}  # fmt: skip
# OpenAI's fields that are not supported: only values without any effect are accepted
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "presence_penalty": (0,), "frequency_penalty": (0,),
    "logit_bias": ({},), "response_format": ({"type": "text"},), "modalities": (["text"],), "tools": ([],),
    "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
    "function_call": ("none", "auto"), "name": (), "refusal": (), "annotations": ([],), "audio": (),
    "tool_calls": ([],),
}  # fmt: skip

# fields for which null has a meaning
_SAYING = {"adjustment"}


def _described(text: str) -> WrapValidator:
    """Replace the errors of all branches of a union by one sentence."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"should be {text}") from None

    return WrapValidator(check)


class _Asked(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_what_changes_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > _MOST_FIELDS:
            raise ValueError(f"should have at most {_MOST_FIELDS} fields")
        left = {n: value for n, value in data.items() if n not in _IGNORED and (value is not None or n in _SAYING)}
        for name in _NEUTRAL.keys() & left.keys() - cls.model_fields.keys():
            if left[name] in _NEUTRAL[name]:
                del left[name]
        return left


class StreamOptions(_Asked):
    """Options of a streamed response."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _Request(_Asked):
    model: str | None = Field(None, description="the model that /v1/models lists")
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: Annotated[
        str | Annotated[list[str], Field(max_length=_MOST_STOPS, fail_fast=True)],
        _described(f"a text or a list of texts, at most {_MOST_STOPS}"),
    ] = []
    repetition_penalty: float | None = None
    adjustment: str | None = Field(
        None, description="name of a loaded adjustment; null for the checkpoint without adjustment"
    )

    @property
    def chooses(self) -> bool:
        """Whether the request chooses an adjustment."""
        return "adjustment" in self.model_fields_set

    def sampling(self, max_tokens: int | None, logprobs: int | None, stops: tuple[str, ...] = ()) -> Sampling:
        """The sampling options of this request.

        Args:
            max_tokens: largest number of tokens to write.
            logprobs: likeliest tokens to report for each token.
            stops: additional stop strings.

        Raises:
            RefusalError: if a value is out of range.
        """
        names = ("temperature", "top_p", "top_k", "seed", "repetition_penalty")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        own = [self.stop] if isinstance(self.stop, str) else self.stop
        try:
            sampling = Sampling(max_tokens=max_tokens, logprobs=logprobs, stop=tuple(own), **given)
        except ValidationError as error:
            field, problem = first_problem(error)
            raise RefusalError(400, f"{field} {problem}", param=field) from None
        return sampling.model_copy(update={"stop": sampling.stop + stops})


class CompletionRequest(_Request):
    """Body of `/v1/completions`."""

    prompt: Annotated[
        str | _Prompts[str] | _Many[int] | _Prompts[_Many[int]],
        _described(
            "a text, a list of texts, a list of token numbers or a list of such lists, none of them empty, "
            f"at most {_MOST} prompts"
        ),
    ]
    max_tokens: int = 16
    logprobs: int | None = None

    def prompts(self) -> list[str | list[int]]:
        """One prompt per text to be written."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(_Asked):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Asked):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str | Annotated[list[TextPart], Field(max_length=_MOST, fail_fast=True)],
        _described(f"a text or a list of text parts, at most {_MOST}; nothing else can be read"),
    ]

    def plain(self) -> dict[str, str]:
        """The message in the form that chat templates expect, in which the role `developer` is called `system`."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return {"role": "system" if self.role == "developer" else self.role, "content": "".join(parts)}


class ChatRequest(_Request):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=_MOST, fail_fast=True)]
    max_completion_tokens: int | None = None
    max_tokens: int | None = Field(None, description="the older name of max_completion_tokens")
    logprobs: bool = False
    top_logprobs: int | None = None

    def asked_logprobs(self) -> int | None:
        """Likeliest tokens to report for each token; None for no log-probabilities.

        Raises:
            RefusalError: if `top_logprobs` is given without `logprobs`.
        """
        if not self.logprobs and self.top_logprobs is not None:
            raise RefusalError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return self.top_logprobs or 0 if self.logprobs else None
