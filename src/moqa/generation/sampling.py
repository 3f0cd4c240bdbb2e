"""How the next token is chosen, and when to stop."""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator

from moqa.errors import MoqaError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Smaller temperatures would overflow the logits; they always choose the likeliest token anyway.
GREEDY_BELOW = 1e-5

_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
# options that a model's generation_config.json may set
_OF_THE_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class Sampling(BaseModel, frozen=True, extra="forbid"):
    """Sampling options of one text; the same seed gives the same text, whatever else runs.

    Those that are not given are the model's own, of its generation_config.json, where that sets them.

    >>> Sampling(max_tokens=64, temperature=0.7, stop=("\\n\\n",)).top_p
    1.0
    """

    echo: bool = Field(False, description="report the prompt too, before what is written")
    max_tokens: int | None = Field(
        None, ge=0, description="largest number of tokens to write; None for as many as fit; 0 only with echo"
    )
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False, description="0 takes the likeliest token")
    top_p: float = Field(
        1.0, ge=0, le=1, allow_inf_nan=False, description="likeliest tokens that reach this probability"
    )
    top_k: int = Field(0, ge=0, description="the k likeliest tokens only; 0 for all")
    min_p: float = Field(
        0.0, ge=0, le=1, allow_inf_nan=False, description="smallest probability, as a share of the likeliest token's"
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="None for a different text every time")
    stop: tuple[_Stop, ...] = Field((), max_length=16, description="strings that end the text and are left out of it")
    repetition_penalty: float = Field(
        1.0, gt=0, le=10, allow_inf_nan=False, description="above 1 makes tokens of the text so far less likely"
    )
    presence_penalty: _Penalty = Field(0.0, description="subtracted from the logits of tokens that were written")
    frequency_penalty: _Penalty = Field(0.0, description="subtracted for each time that a token was written")
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] = Field(
        {}, max_length=1024, description="added to the logits of tokens"
    )
    grammar: str | None = Field(None, description="all that may be written, as a Lark or GBNF grammar")
    logprobs: int | None = Field(None, ge=0, le=20, description="likeliest tokens to report for each token")
    skip_special_tokens: bool = Field(True, description="leave special tokens out of the text")

    @field_validator("max_tokens")
    @classmethod
    def _write_or_echo(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value == 0 and not info.data.get("echo"):
            raise ValueError("should be greater than or equal to 1")
        return value

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW

    @classmethod
    def of(cls, **options: Any) -> "Sampling":
        """Make a `Sampling` from a user's options.

        >>> Sampling.of(temperature=-1)
        Traceback (most recent call last):
        moqa.errors.MoqaError: --temperature -1: should be greater than or equal to 0

        Raises:
            MoqaError: if an option is out of range; the message names the first one and its range.
        """
        try:
            return cls(**options)
        except ValidationError as error:
            field, problem = first_problem(error)
            raise MoqaError(f"--{field.replace('_', '-')} {options.get(field)}", problem) from None

    def completed(self, model: "PreTrainedModel") -> "Sampling":
        """With the model's own values for what was not given.

        >>> Sampling(top_k=5).completed(model).top_k
        5

        Raises:
            MoqaError: if a value in the model's generation_config.json is out of range.
        """
        config = model.generation_config
        own = {name: value for name in _OF_THE_MODEL if (value := getattr(config, name, None)) is not None}
        if getattr(config, "do_sample", None) is False:
            own["temperature"] = 0.0
        if own.get("top_k", 0) < 0:  # how some spell "all"
            own["top_k"] = 0
        missing = own.keys() - self.model_fields_set
        if not missing:
            return self
        try:
            valid = Sampling(**{name: own[name] for name in missing})
        except ValidationError as error:
            field, problem = first_problem(error)
            raise MoqaError(f"generation_config.json says {field} {own[field]}", problem) from None
        return self.model_copy(update={name: getattr(valid, name) for name in missing})


def first_problem(error: ValidationError) -> tuple[str, str]:
    """The first invalid field, and what it should be; without its value, which may be private."""
    found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return str(found["loc"][0]) if found["loc"] else "", should(found["msg"])


def should(message: str) -> str:
    """The part of pydantic's message that begins with "should".

    >>> should("Input should be greater than or equal to 0")
    'should be greater than or equal to 0'
    """
    return message[max(message.find("should"), 0) :]
