"""What a checkpoint keeps for later adjustments: parts of the original, and how its known distributions are routed."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moqa.errors import MoqaError
from moqa.format.routing import DIGITS, Routing, write_routing
from moqa.models.experts import PROJECTIONS
from moqa.models.view import ModelView, narrowest
from moqa.profiling import SELF, Profile

WHOLE_ORIGINAL = "full"


def parse_cache(text: str) -> float | None:
    """Share of the channels to keep; None for the whole original.

    >>> parse_cache("1%"), parse_cache("full")
    (0.01, None)

    Raises:
        MoqaError: if it is neither a share nor `full`.
    """
    if text.strip().lower() == WHOLE_ORIGINAL:
        return None
    try:
        share = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        share = 0.0
    if not text.strip().endswith("%") or not 0 < share <= 1:
        raise MoqaError(
            f"--cache {text} is not a share of the channels", "give e.g. 1%, or full for the whole original"
        )
    return share


def cache_layers(
    view: ModelView, profile: Profile, known: tuple[str, ...], share: float | None
) -> Iterator[dict[str, Tensor]]:
    """Tensors of every layer for `moqa.format.cache.write_cache`.

    A part consists of the channels whose share of their layer's significance changes most between distributions,
    including the model's own text (MoQa's ~1 %; the paper leaves the measure of change open, ours is the range).

    Args:
        view: the original, whose weights are read.
        profile: of the known distributions.
        known: their names.
        share: of all channels; None for the whole original.
    """
    names = [*known, SELF] if SELF in profile.statistics else [*known]
    shares = {
        layer: torch.stack([_shares(profile.layer(name, layer, "channel")) for name in names])
        for layer in profile.expert_layers
    }
    places: dict[int, Tensor] = {}
    if share is not None:
        places = _most_dynamic({n: table.max(0).values - table.min(0).values for n, table in shares.items()}, share)
    for layer in range(len(view.blocks)):
        units = view.block_units(layer)
        stored = {unit.name: narrowest(view.weight(unit)).contiguous() for unit in units} if share is None else {}
        if layer in shares:
            stored["significance"] = shares[layer][: len(known)].mean(0)
        if layer in places:
            stored |= _rows(view, layer, places[layer])
        yield stored


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
            name: tuple(_rounded_shares(profile.layer(name, layer, "tokens")) for layer in layers)
            for name in sorted(known)
        }
        routing = Routing(
            fingerprint=profile.record.fingerprint, top_k=profile.record.top_k, layers=layers, known=shares
        )
        write_routing(target, routing)


def _rounded_shares(tokens: Tensor) -> tuple[float, ...]:
    return tuple(round(share, DIGITS) for share in (tokens.double() / tokens.sum()).tolist())


def _shares(channel: Tensor) -> Tensor:
    return channel / channel.sum().clamp_min(1e-30)


def _most_dynamic(dynamics: Mapping[int, Tensor], share: float) -> dict[int, Tensor]:
    """Layer -> [channels, 2] (expert, channel), ascending."""
    if not dynamics:
        raise MoqaError("--cache keeps channels of experts", "this model has no routed experts")
    everything = torch.cat([table.flatten() for table in dynamics.values()])
    limit = everything.topk(max(1, round(len(everything) * share))).values[-1]
    return {layer: (table >= limit).nonzero() for layer, table in dynamics.items() if bool((table >= limit).any())}


def _rows(view: ModelView, layer: int, places: Tensor) -> dict[str, Tensor]:
    path = view.experts_path(layer)
    vectors: dict[str, list[Tensor]] = {projection: [] for projection in PROJECTIONS}
    for expert, channel in places.tolist():
        for projection in PROJECTIONS:
            matrix = view.weight(view.units[f"{path}.{expert}.{projection}"])
            vectors[projection].append(matrix[:, channel] if projection == "down_proj" else matrix[channel])
    rows = {projection: narrowest(torch.stack(parts)) for projection, parts in vectors.items()}
    return rows | {"channel": places.int()}
