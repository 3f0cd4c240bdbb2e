"""How the next token is chosen, and when to stop."""

from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from moqa.errors import MoqaError

# Logits divided by less overflow; the likeliest token is all that such a temperature leaves.
GREEDY_BELOW = 1e-5

_Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Sampling(BaseModel, frozen=True, extra="forbid"):
    """How one text is continued; the same seed gives the same text, whatever else runs.

    >>> Sampling(max_tokens=64, temperature=0.7, stop=("\\n\\n",)).top_p
    1.0
    """

    max_tokens: int | None = Field(None, ge=1, description="tokens to write at most; None for as many as fit")
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False, description="0 takes the likeliest token")
    top_p: float = Field(1.0, ge=0, le=1, allow_inf_nan=False, description="likeliest tokens that share this much")
    top_k: int = Field(0, ge=0, description="the k likeliest tokens only; 0 for all")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="None for another text every time")
    stop: tuple[_Stop, ...] = Field((), max_length=16, description="texts that end the answer and are left out of it")
    repetition_penalty: float = Field(
        1.0, gt=0, le=10, allow_inf_nan=False, description="above 1 disfavours what was read or written before"
    )
    logprobs: int | None = Field(None, ge=0, le=20, description="likeliest tokens to report beside each one written")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW

    @classmethod
    def of(cls, **options: Any) -> "Sampling":
        """Sampling from options as a user gives them.

        >>> Sampling.of(temperature=-1)
        Traceback (most recent call last):
        moqa.errors.MoqaError: --temperature -1: should be greater than or equal to 0

        Raises:
            MoqaError: naming the first option that is out of range, and what it may be.
        """
        try:
            return cls(**options)
        except ValidationError as error:
            field, problem = first_problem(error)
            raise MoqaError(f"--{field.replace('_', '-')} {options.get(field)}", problem) from None


def first_problem(error: ValidationError) -> tuple[str, str]:
    """The field that is wrong first, and what it should be; without its value, which may be private."""
    found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return str(found["loc"][0]) if found["loc"] else "", should(found["msg"])


def should(message: str) -> str:
    """What pydantic says that a value should be, without what it calls the value.

    >>> should("Input should be greater than or equal to 0")
    'should be greater than or equal to 0'
    """
    return message[max(message.find("should"), 0) :]
