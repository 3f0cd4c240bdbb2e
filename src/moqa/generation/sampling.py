"""How the next token is chosen, and when to stop."""

from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from moqa.errors import MoqaError

# Smaller temperatures would overflow the logits; they always choose the likeliest token anyway.
GREEDY_BELOW = 1e-5

_Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Sampling(BaseModel, frozen=True, extra="forbid"):
    """Sampling options of one text; the same seed gives the same text, whatever else runs.

    >>> Sampling(max_tokens=64, temperature=0.7, stop=("\\n\\n",)).top_p
    1.0
    """

    max_tokens: int | None = Field(None, ge=1, description="largest number of tokens to write; None for as many as fit")
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False, description="0 takes the likeliest token")
    top_p: float = Field(
        1.0, ge=0, le=1, allow_inf_nan=False, description="likeliest tokens that reach this probability"
    )
    top_k: int = Field(0, ge=0, description="the k likeliest tokens only; 0 for all")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="None for a different text every time")
    stop: tuple[_Stop, ...] = Field((), max_length=16, description="strings that end the text and are left out of it")
    repetition_penalty: float = Field(
        1.0, gt=0, le=10, allow_inf_nan=False, description="above 1 makes tokens of the text so far less likely"
    )
    logprobs: int | None = Field(None, ge=0, le=20, description="likeliest tokens to report for each written token")

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
