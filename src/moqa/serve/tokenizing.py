"""Routes that show how the model's tokenizer and chat template work, as vLLM has them."""

from typing import Annotated, Any

from fastapi import FastAPI, Request
from pydantic import Field, model_validator
from starlette.responses import JSONResponse, Response

from moqa.errors import MoqaError
from moqa.generation import chat_prompt, encode
from moqa.serve.common import check_model
from moqa.serve.fields import AskedBody, Prompts
from moqa.serve.messages import ChatMessage, Tool
from moqa.serve.refusal import RefusalError
from moqa.serve.service import Service


class TokenizeRequest(AskedBody):
    """Body of `/tokenize`: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = Field(True, description="of a prompt; a chat template adds them itself")
    messages: Prompts[ChatMessage] | None = None
    tools: list[Tool] = Field([])
    chat_template_kwargs: dict[str, Any] = Field({})
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise RefusalError(400, "give either prompt or messages", param="prompt")
        return self


class DetokenizeRequest(AskedBody):
    """Body of `/detokenize`."""

    model: str | None = None
    tokens: Annotated[list[int], Field(fail_fast=True)]


def add_tokenizer_routes(app: FastAPI, service: Service) -> None:
    """Add `/tokenize`, `/detokenize` and `/tokenizer_info`."""
    tokenizer = service.tokenizer

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        def found(body: TokenizeRequest) -> dict[str, Any]:
            check_model(service, body.model)
            if body.messages is None:
                ids = encode(tokenizer, body.prompt or "", body.add_special_tokens)
            else:
                messages, tools = ([one.plain() for one in some] for some in (body.messages, body.tools))
                ids, _ = chat_prompt(tokenizer, messages, tools, body.chat_template_kwargs, service.context)
            spelt = tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
            return {"count": len(ids), "max_model_len": service.context, "tokens": ids, "token_strs": spelt}

        body, answer = await service.bodies.read(request, TokenizeRequest, found)
        return JSONResponse(answer, headers=body.headers())

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        def found(body: DetokenizeRequest) -> dict[str, Any]:
            check_model(service, body.model)
            unknown = next((token for token in body.tokens if not 0 <= token < len(tokenizer)), None)
            if unknown is not None:
                raise MoqaError(f"tokens has {unknown}", f"the tokenizer knows 0 to {len(tokenizer) - 1}")
            return {"prompt": tokenizer.decode(body.tokens, clean_up_tokenization_spaces=False)}

        body, answer = await service.bodies.read(request, DetokenizeRequest, found)
        return JSONResponse(answer, headers=body.headers())

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        special = {f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
        about = {"tokenizer_class": type(tokenizer).__name__, "chat_template": tokenizer.chat_template}
        return JSONResponse({**about, **special, "model_max_length": service.context})
