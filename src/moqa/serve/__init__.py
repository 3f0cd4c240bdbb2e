"""The server: answers OpenAI-style requests with one model, several texts in turns."""

from pathlib import Path
from typing import Any

from moqa.errors import MoqaError

__all__ = ["serve"]

_EXTRA = ("fastapi", "h11", "starlette", "uvicorn", "prometheus_client")


def serve(model: str | Path, **options: Any) -> None:
    """Answer OpenAI-style requests until SIGTERM or Ctrl-C; for the options see `moqa.serve.run.serve`.

    >>> serve("runs/out", port=8000)  # doctest: +SKIP

    Raises:
        MoqaError: if the model is missing or damaged, the port is in use, or a library of the server is missing.
    """
    try:
        from moqa.serve.run import serve as run
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in _EXTRA:
            raise MoqaError("the server needs `pip install 'moqa[serve]'`", f"{error.name} is missing") from None
        raise
    run(model, **options)
