"""What request bodies have in common: which fields are read, refused, or ignored."""

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)  # fmt: skip

from moqa.serve.refusal import RefusalError

_T = TypeVar("_T")
# without fail_fast, a million numbers would produce a million errors of the branch for texts
Many = Annotated[list[_T], Field(min_length=1, fail_fast=True)]
MOST = 4096  # prompts, messages, and parts of a message
Prompts = Annotated[list[_T], Field(min_length=1, max_length=MOST, fail_fast=True)]

IGNORED_HEADER = "x-moqa-ignored"
_MOST_FIELDS = 100  # of one object
_MOST_NAMED = 20
# these have no effect on any text
_WITHOUT_EFFECT = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prediction", "request_id", "cache_prompt",
}  # fmt: skip
# fields of OpenAI's API and of other servers that would change the answer: only values without any effect are accepted
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",), "modalities": (["text"],), "functions": ([],), "function_call": ("none", "auto"), "audio": (),
    "web_search_options": (), "verbosity": ("medium",), "enable_thinking": (), "thinking": (), "reasoning": (),
    "best_of": (1,), "echo": (False,), "chat_template": (), "documents": ([],), "add_generation_prompt": (True,),
    "continue_final_message": (False,), "min_tokens": (0,), "ignore_eos": (False,), "stop_token_ids": ([],),
    "use_beam_search": (False,), "length_penalty": (1,), "bad_words": ([],), "allowed_token_ids": ([],),
    "include_stop_str_in_output": (False,), "truncate_prompt_tokens": (), "prompt_logprobs": (),
    "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (), "structured_outputs": (),
    "json_schema": (), "mirostat": (0,), "typical_p": (1,), "tfs_z": (1,), "xtc_probability": (0,),
    "dry_multiplier": (0,), "dynatemp_range": (0,), "repeat_penalty": (1,), "top_n_sigma": (-1,), "n_predict": (-1,),
    "samplers": (), "lora": ([],),
}  # fmt: skip


def described(text: str) -> WrapValidator:
    """Replace the errors of all branches of a union by one sentence."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"should be {text}") from None

    return WrapValidator(check)


class Asked(BaseModel):
    """A part of a request; fields that nobody knows are ignored, and the response names them.

    Attributes:
        saying: fields for which null has a meaning; otherwise it is as if they were not there.
    """

    model_config = ConfigDict(strict=True, extra="allow", validate_by_alias=True)
    saying: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > _MOST_FIELDS:
            raise ValueError(f"should have at most {_MOST_FIELDS} fields")
        read = cls._checked(data)
        return {name: value for name, value in read.items() if value is not None or name in cls.saying}

    @classmethod
    def _checked(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields that are read."""
        return fields

    def ignored(self, place: str = "") -> Iterator[str]:
        """Names of the fields that were ignored, here and in all parts."""
        yield from (f"{place}{name}" for name in self.model_extra or ())
        for name in type(self).model_fields:
            value = getattr(self, name)
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, Asked):
                    yield from part.ignored(f"{place}{name}.")


class AskedBody(Asked):
    """A whole request; fields that would change the answer and are not supported are refused."""

    @classmethod
    def _checked(cls, fields: dict[str, Any]) -> dict[str, Any]:
        left = {name: value for name, value in fields.items() if name not in _WITHOUT_EFFECT}
        for name in left.keys() - cls.model_fields.keys():
            value = left[name]
            if name in _UNSUPPORTED:
                if value is not None and value not in _UNSUPPORTED[name]:
                    raise RefusalError(400, f"{name} is not supported: leave it out", param=name)
                del left[name]
            elif meant := get_close_matches(name[:60], cls.model_fields, 1, 0.8):
                shown = _printable(name)
                raise RefusalError(400, f"{shown} is not supported: did you mean {meant[0]}?", param=shown)
        return left

    def headers(self, others: Iterable[str] = ()) -> dict[str, str]:
        """Headers that name what was ignored.

        Args:
            others: further fields that have no effect, e.g. in the model's chat template.
        """
        names = sorted({_printable(name) for name in (*self.ignored(), *others)})
        return {IGNORED_HEADER: ", ".join(names[:_MOST_NAMED])} if names else {}


def _printable(name: str) -> str:
    """A client's name, in a form that fits into a header."""
    return re.sub(r"[^\w.-]", "?", name[:60], flags=re.ASCII)
