"""All that moqa uses of Flower: imported here alone, and only of a version that was tested."""

from importlib.metadata import PackageNotFoundError, version

from moqa.errors import MoqaError

TESTED = "1.41"


def check_flower() -> None:
    """Refuse a Flower that is missing or was not tested.

    >>> check_flower()

    Raises:
        MoqaError: naming the version that was found and one that works.
    """
    try:
        found = version("flwr")
    except PackageNotFoundError:
        raise MoqaError("Flower is not installed", "pip install 'moqa[federated]'") from None
    if not f"{found}.".startswith(f"{TESTED}."):
        raise MoqaError(f"Flower {found} was not tested with this moqa", f"pip install 'flwr=={TESTED}.*'")


check_flower()

from flwr.app import (  # noqa: E402
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.clientapp.typing import ClientAppCallable  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.serverapp.strategy import FedAvg, Result  # noqa: E402
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

__all__ = [
    "Array", "ArrayRecord", "ClientApp", "ClientAppCallable", "ConfigRecord", "Context", "Error", "FedAvg", "Grid",
    "Message", "MetricRecord", "RecordDict", "Result", "ServerApp", "TaskIdentity", "check_flower", "message_bytes",
]  # fmt: skip


def message_bytes(message: Message) -> int:
    """Bytes of all objects as which Flower sends a message, names and headers counted."""
    return sum(len(part.deflate()) for part in get_all_nested_objects(message).values())
