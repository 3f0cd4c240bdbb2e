"""Bodies of the requests for text."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from moqa.generation import Sampling, json_grammar
from moqa.generation.sampling import first_problem
from moqa.serve.fields import MOST, Asked, AskedBody, Many, Prompts, described
from moqa.serve.messages import ChatMessage, ChosenTool, Tool
from moqa.serve.refusal import RefusalError

_MOST_CHOICES, _MOST_STOPS, _MOST_TOOLS = 128, 16, 128


class StreamOptions(Asked):
    """Options of a streamed response."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class NamedSchema(Asked):
    """A JSON schema with a name."""

    name: str = ""
    description: str | None = None
    strict: bool | None = Field(None, description="it is always followed strictly")
    wanted: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Asked):
    """What the answer has to look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    wanted: dict[str, Any] | None = Field(None, alias="schema", description="of a json_object")

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("should have a json_schema if that is its type, and only then")
        return self

    @property
    def grammar(self) -> str | None:
        """The grammar of the answer; None for any text."""
        if self.type == "text":
            return None
        return json_grammar(self.json_schema.wanted if self.json_schema else self.wanted or {"type": "object"})


class _Request(AskedBody):
    saying: ClassVar[frozenset[str]] = frozenset({"adjustment"})

    model: str | None = Field(None, description="one of those that /v1/models lists")
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = Field(1, ge=1, le=_MOST_CHOICES, description="answers to each prompt")
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Annotated[
        str | Annotated[list[str], Field(max_length=_MOST_STOPS, fail_fast=True)],
        described(f"a text or a list of texts, at most {_MOST_STOPS}"),
    ] = Field([])
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    grammar: str | None = Field(None, description="of the answer, in Lark's or GBNF's notation")
    adjustment: str | None = Field(
        None, description="name of a loaded adjustment; null for the checkpoint without adjustment"
    )

    variant: str | None = Field(None, description="of a mixture, by name; null leaves the choice to its router")

    @property
    def chooses(self) -> bool:
        """Whether the request chooses an adjustment."""
        return "adjustment" in self.model_fields_set

    @property
    def copies(self) -> int:
        """Texts to write for each prompt."""
        return self.n

    def own_grammar(self) -> str | None:
        """The grammar that the request gives.

        Raises:
            RefusalError: if it gives two.
        """
        wanted = self.response_format.grammar if self.response_format else None
        if wanted and self.grammar:
            raise RefusalError(400, "grammar and response_format cannot be combined", param="grammar")
        return wanted or self.grammar

    def sampling(self, **options: Any) -> list[Sampling]:
        """The sampling options of each copy.

        Args:
            options: of `Sampling`, beside or instead of the fields that have the same name there.

        Raises:
            RefusalError: if a value is out of range.
        """
        shared = Sampling.model_fields.keys() & type(self).model_fields.keys()
        given = {name: value for name in shared if (value := getattr(self, name)) is not None}
        own = [self.stop] if isinstance(self.stop, str) else self.stop
        try:
            sampling = Sampling(**{**given, "stop": tuple(own), "grammar": self.own_grammar(), **options})
        except ValidationError as error:
            field, problem = first_problem(error)
            raise RefusalError(400, f"{field} {problem}", param=field) from None
        if sampling.seed is None:
            return [sampling] * self.copies
        return [sampling.model_copy(update={"seed": sampling.seed + number}) for number in range(self.copies)]


class CompletionRequest(_Request):
    """Body of `/v1/completions`."""

    prompt: Annotated[
        str | Prompts[str] | Many[int] | Prompts[Many[int]],
        described(
            "a text, a list of texts, a list of token numbers or a list of such lists, none of them empty, "
            f"at most {MOST} prompts"
        ),
    ]
    max_tokens: int = 16
    logprobs: int | None = None
    echo: bool = False
    best_of: int | None = Field(
        None, ge=1, le=_MOST_CHOICES, description="write so many, and answer with the n likeliest"
    )

    @model_validator(mode="after")
    def _enough_to_choose_from(self) -> "CompletionRequest":
        if self.copies < self.n:
            raise RefusalError(400, f"best_of {self.copies} is less than n {self.n}", param="best_of")
        if self.copies > self.n and self.stream:
            raise RefusalError(400, "best_of cannot be streamed: leave out one of the two", param="best_of")
        return self

    @property
    def copies(self) -> int:
        """See `_Request`."""
        return self.n if self.best_of is None else self.best_of

    def prompts(self) -> list[str | list[int]]:
        """One prompt per text to be written."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def samplings(self) -> list[Sampling]:
        """See `_Request.sampling`."""
        # the likeliest of several cannot be told without log-probabilities
        logprobs = 0 if self.logprobs is None and self.copies > self.n else self.logprobs
        return self.sampling(logprobs=logprobs)


class ChatRequest(_Request):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST, fail_fast=True)]
    max_completion_tokens: int | None = None
    max_tokens: int | None = Field(None, description="the older name of max_completion_tokens")
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: Annotated[list[Tool], Field(max_length=_MOST_TOOLS)] = Field([])
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | ChosenTool, described("none, auto, required, or a function by its name")
    ] = "auto"
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] = Field({})

    @property
    def offered(self) -> list[Tool]:
        """Functions that the model may call.

        Raises:
            RefusalError: if the one that is to be called is not among the tools.
        """
        if self.tool_choice == "none":
            return []
        if self.tool_choice != "auto" and not self.tools:
            raise RefusalError(400, "tool_choice needs tools", param="tool_choice")
        if isinstance(self.tool_choice, ChosenTool):
            chosen = self.tool_choice.function.name
            if chosen not in [tool.function.name for tool in self.tools]:
                raise RefusalError(400, "the tool of tool_choice is not among the tools", param="tool_choice")
        return self.tools

    @property
    def forced(self) -> list[Tool]:
        """Functions one of which has to be called; none if the model may answer in other ways."""
        if isinstance(self.tool_choice, ChosenTool):
            return [tool for tool in self.offered if tool.function.name == self.tool_choice.function.name]
        return self.offered if self.tool_choice == "required" else []

    def variables(self) -> dict[str, Any]:
        """Variables of the chat template."""
        if self.reasoning_effort is None:
            return self.chat_template_kwargs
        off = {"enable_thinking": False} if self.reasoning_effort == "none" else {}
        return {"reasoning_effort": self.reasoning_effort, **off, **self.chat_template_kwargs}

    def without_effect(self, template: str) -> Iterator[str]:
        """Fields that the model's chat template does not read."""
        names = [f"chat_template_kwargs.{name}" for name in self.chat_template_kwargs if name not in template]
        yield from names
        read = [name for name in self.variables().keys() - self.chat_template_kwargs.keys() if name in template]
        if self.reasoning_effort is not None and not read:
            yield "reasoning_effort"
        if not self.forced and any(tool.function.strict for tool in self.tools):
            yield "tools.function.strict"

    def asked_logprobs(self) -> int | None:
        """Likeliest tokens to report for each token; None for no log-probabilities.

        Raises:
            RefusalError: if `top_logprobs` is given without `logprobs`.
        """
        if not self.logprobs and self.top_logprobs is not None:
            raise RefusalError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return self.top_logprobs or 0 if self.logprobs else None
