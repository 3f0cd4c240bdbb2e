"""Error responses in the format of OpenAI's API."""

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
    """The request is refused.

    >>> RefusalError(400, "temperature should be a number", param="temperature").body()["error"]["type"]
    'invalid_request_error'

    Args:
        status: HTTP status.
        message: what was given and what would work, without any part of the prompt.
        param: name of the invalid field.
        code: machine-readable error code.
        headers: additional HTTP headers.
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
        """The JSON body of the response."""
        kind = "server_error" if self.status_code >= 500 else _TYPES.get(self.status_code, "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response with status and headers."""
        return JSONResponse(self.body(), self.status_code, headers=self.headers)


def stopping() -> RefusalError:
    """The refusal of what the server no longer begins."""
    return RefusalError(503, "the server is stopping", code="stopping", headers={"Retry-After": "5"})


def refusal_of(error: Exception) -> RefusalError:
    """The refusal for any exception; bugs are logged, without their message, which may quote a prompt."""
    if isinstance(error, RefusalError):
        return error
    if isinstance(error, MoqaError):
        code = "context_length_exceeded" if isinstance(error, ContextError) else None
        return RefusalError(400, str(error), code=code)
    if isinstance(error, HTTPException):
        return RefusalError(error.status_code, error.detail, headers=error.headers)
    _LOG.error("moqa: %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    return RefusalError(500, "internal error; the server's log says where", code="internal_error")
