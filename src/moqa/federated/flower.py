"""All that moqa uses of Flower: imported here alone, and only of a version that was tested."""

from importlib.metadata import PackageNotFoundError, version

from moqa.errors import MoqaError

TESTED = "1.41"
_KEY = 48  # bytes of a private key


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

from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat  # noqa: E402
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
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares  # noqa: E402
from flwr.common.secure_aggregation.crypto.symmetric_encryption import (  # noqa: E402
    decrypt,
    encrypt,
    generate_shared_key,
)
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.serverapp.strategy import FedAvg, Result  # noqa: E402
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects  # noqa: E402
from flwr.supercore.primitives.asymmetric import generate_key_pairs  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

__all__ = [
    "Array", "ArrayRecord", "ClientApp", "ClientAppCallable", "ConfigRecord", "Context", "Error", "FedAvg", "Grid",
    "Message", "MetricRecord", "RecordDict", "Result", "ServerApp", "TaskIdentity", "check_flower", "combine_shares",
    "create_shares", "decrypt", "encrypt", "key_pair", "message_bytes", "shared_key",
]  # fmt: skip


def message_bytes(message: Message) -> int:
    """Bytes of all objects as which Flower sends a message, names and headers counted."""
    return sum(len(part.deflate()) for part in get_all_nested_objects(message).values())


def key_pair() -> tuple[bytes, bytes]:
    """A private key of an elliptic curve and its public key, as short as they can be: 48 and 49 bytes."""
    private, public = generate_key_pairs()
    number = private.private_numbers().private_value.to_bytes(_KEY, "big")
    return number, public.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)


def shared_key(private: bytes, public: bytes) -> bytes:
    """The secret that two clients have in common, from the private key of either and the public one of the other.

    >>> one, other = key_pair(), key_pair()
    >>> shared_key(one[0], other[1]) == shared_key(other[0], one[1])
    True

    Raises:
        ValueError: if the public key is no point of the curve.
    """
    curve = ec.SECP384R1()  # Flower's
    own = ec.derive_private_key(int.from_bytes(private, "big"), curve)
    return generate_shared_key(own, ec.EllipticCurvePublicKey.from_encoded_point(curve, public))
