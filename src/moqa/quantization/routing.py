"""Record in a checkpoint how its known distributions are routed."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from moqa.format.routing import DIGITS, Routing, write_routing
from moqa.profiling import Profile


def describe_routing(target: Path, profile: Profile, known: Sequence[str]) -> None:
    """Write how the known distributions use the experts; nothing if the model has no experts or no known distributions.

    Args:
        target: folder of the checkpoint, still being written.
        profile: of the known distributions.
        known: their names.
    """
    layers = profile.expert_layers
    if layers and known:
        shares = {
            name: tuple(_shares(profile.layer(name, layer, "tokens")) for layer in layers) for name in sorted(known)
        }
        routing = Routing(
            fingerprint=profile.record.fingerprint, top_k=profile.record.top_k, layers=layers, known=shares
        )
        write_routing(target, routing)


def _shares(tokens: Tensor) -> tuple[float, ...]:
    return tuple(round(share, DIGITS) for share in (tokens.double() / tokens.sum()).tolist())
