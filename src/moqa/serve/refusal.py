"""Everything but an answer: errors in the shape that OpenAI's clients understand."""

import logging
import traceback
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from moqa.errors import MoqaError
from moqa.generation import ContextError

_LOG = logging.getLogger(__name__)
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class RefusalError(HTTPException):
    """A request that gets no answer.

    >>> RefusalError(400, "temperature should be a number", param="temperature").body()["error"]["type"]
    'invalid_request_error'

    Args:
        status: of HTTP.
        message: what was given and what would work, without any of the prompt.
        param: the field that is wrong.
        code: for programs.
        headers: to send along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    def body(self) -> dict[str, dict[str, str | None]]:
        """What the client gets."""
        kind = "server_error" if self.status_code >= 500 else _TYPES.get(self.status_code, "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The same with status and headers."""
        return JSONResponse(self.body(), self.status_code, headers=self.headers)


def refusal_of(error: Exception) -> RefusalError:
    """What a client is told of any exception; a bug is logged, without its message, which may quote a prompt."""
    if isinstance(error, RefusalError):
        return error
    if isinstance(error, MoqaError):
        code = "context_length_exceeded" if isinstance(error, ContextError) else None
        return RefusalError(400, str(error), code=code)
    if isinstance(error, HTTPException):
        return RefusalError(error.status_code, error.detail, headers=error.headers)
    _LOG.error("moqa: %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    return RefusalError(500, "an error inside the server; its log says where", code="internal_error")
