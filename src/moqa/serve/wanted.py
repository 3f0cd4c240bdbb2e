"""From the body of a request to what is written and how it is answered; may take a while for long texts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from moqa.data.chat import template_of
from moqa.generation import chat_prompt
from moqa.serve.answers import Answer, ChatAnswer
from moqa.serve.common import check_model
from moqa.serve.refusal import RefusalError
from moqa.serve.said import AnswerReader
from moqa.serve.schema import ChatRequest, CompletionRequest
from moqa.serve.service import Service, Text
from moqa.serve.tools import forced_grammar, reader_of


class Wanted(NamedTuple):
    """What a request asks for."""

    texts: Sequence[Text]
    answer: Answer
    headers: dict[str, str]


def completion(service: Service, body: CompletionRequest) -> Wanted:
    """What a completion asks for.

    Raises:
        MoqaError: if the model cannot write it.
        RefusalError: if it does not fit this server.
    """
    check_model(service, body.model)
    texts = service.texts(body.prompts(), body.samplings())
    answer = Answer(service.name, service.tokenizer, body.logprobs is not None, body.copies, body.n)
    return Wanted(texts, answer, body.headers())


def chat(service: Service, body: ChatRequest) -> Wanted:
    """What an answer in a conversation asks for; for errors see `completion`."""
    check_model(service, body.model)
    tools, forced = ([tool.plain() for tool in some] for some in (body.offered, body.forced))
    template = template_of(service.tokenizer, tools=bool(tools))
    reader = reader_of(template, tools, forced=bool(forced))
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    options: dict[str, Any] = {"max_tokens": limit, "logprobs": body.asked_logprobs()}
    if forced:
        options["grammar"] = forced_grammar(forced)
    elif tools and body.own_grammar():
        raise RefusalError(
            400, "a grammar or response_format cannot be combined with tools that may be called: give tool_choice",
            param="tools",
        )  # fmt: skip
    # marks of calls and of channels may be special tokens
    elif reader is not AnswerReader:
        options["skip_special_tokens"] = False

    messages = [message.plain() for message in body.messages]
    ids, stops = chat_prompt(service.tokenizer, messages, tools, body.variables(), service.context)
    samplings = [one.model_copy(update={"stop": one.stop + stops}) for one in body.sampling(**options)]
    texts = service.texts([ids], samplings)
    answer = ChatAnswer(
        service.name, service.tokenizer, body.logprobs, body.copies, body.n,
        reader=reader, most_calls=None if body.parallel_tool_calls else 1,
    )  # fmt: skip
    return Wanted(texts, answer, body.headers(body.without_effect(template)))
