"""Section on activation: routing of tokens, co-activation of experts and similarity of their weights."""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from moqa.profiling.store import Profile
from moqa.reports.blocks import CellGrid, Note, PageElement, Picker, Scale, Section
from moqa.reports.charts import heat_map, stacked, upper
from moqa.reports.drift import distributions
from moqa.reports.significance import titled

_MAX_NAMES = 60
_MAX_PAIRS = 140_000  # of experts in all maps: 370 kB


def activation_section(profile: Profile) -> Section | None:
    """Section on tokens per expert, experts that no token reached, co-activation and similarity."""
    if not profile.expert_layers:
        return None
    tokens = {name: _tokens(profile, name) for name in distributions(profile)}
    shares = {name: table / np.maximum(np.nansum(table, 1, keepdims=True), 1) * 100 for name, table in tokens.items()}
    top = upper(np.stack(list(shares.values())))
    hover = "layer {y}, expert {x}\n{0} tokens\n{z:.2f} % of the layer's"
    maps = tuple(
        heat_map(titled(name), table, profile.expert_layers, hover, (0.0, top), more=[tokens[name]])
        for name, table in shares.items()
    )  # fmt: skip
    even = 100 / max(table.shape[1] for table in tokens.values())
    ends = ("0 %", f"{top:.1f} % or more (even routing: {even:.1f} %)")
    blocks: list[PageElement] = [CellGrid(maps, Scale("sequential", *ends, "share of the layer's routed tokens"))]
    blocks.append(Note(_starved(profile), "Experts that no token reached"))
    reading = (
        "How often the router picks each expert. An expert that few tokens reach has little data to be fitted on. "
        "Counts are not significance: a rarely picked expert can still carry much of what its layer does."
    )
    layers, total = _correlation(profile), len(profile.expert_layers)
    if layers:
        blocks += [
            Note(
                "Co-activation: of the tokens that visit the expert of a row, the share that also visits the expert of "
                "a column, over all given distributions together. Similarity: cosine between the weights of two "
                "experts; near 0 means that they have nothing in common."
                + (f" Shown: {len(layers)} of {total} layers." if len(layers) < total else ""),
                "Experts that work together, experts that are alike",
            ),
            Picker("Layer", layers),
        ]
    return Section("Activation", "Where the tokens go", reading, blocks)


def _tokens(profile: Profile, name: str) -> NDArray[np.float64]:
    return stacked([profile.layer(name, layer, "tokens").double().numpy() for layer in profile.expert_layers])


def _starved(profile: Profile) -> str:
    starved = profile.starved()
    if not starved:
        return "None: every expert was reached on at least one of the given distributions."
    more = f" and {len(starved) - _MAX_NAMES} more" if len(starved) > _MAX_NAMES else ""
    return f"{len(starved)} on none of the given distributions: {', '.join(starved[:_MAX_NAMES])}{more}."


def _correlation(profile: Profile) -> tuple[tuple[str, tuple[PageElement, ...]], ...]:
    layers = _shown(profile)
    together = {layer: _coactivation(profile, layer) for layer in layers}
    alike = {n: s for n in layers if (s := _similarity(profile, n)) is not None}
    has_pairs = profile.record.top_k > 1
    if not has_pairs and not alike:
        return ()
    top = max(upper(table) for table in together.values())
    limit = max((upper(np.abs(table)) for table in alike.values()), default=1.0)
    square = partial(heat_map, axes=("expert", "expert"), height=380)
    options = []
    for layer, table in together.items():
        charts = []
        if has_pairs:
            hover = "of expert {y}'s tokens\n{z:.1f} % also visit expert {x}"
            ends = Scale("sequential", "0 %", f"{top:.0f} % or more")
            charts.append(square("Co-activation", table, range(len(table)), hover, (0.0, top), legend=ends))
        if layer in alike:
            hover = "experts {y} and {x}\ncosine {z:.3f}"
            ends = Scale("diverging", f"\u2212{limit:.3f} or less", f"{limit:.3f} or more")
            bounds = (-limit, limit)
            charts.append(square("Similarity of weights", alike[layer], range(len(table)), hover, bounds,
                                 scale="diverging", legend=ends))  # fmt: skip
        options.append((f"layer {layer}", (CellGrid(tuple(charts)),)))
    return tuple(options)


def _shown(profile: Profile) -> list[int]:
    """Layers whose pairs of experts are shown: all, or as many, evenly spaced, as keep the page small."""
    layers = profile.expert_layers
    pairs = 2 * max(len(profile.layer(profile.names[0], layer, "tokens")) for layer in layers) ** 2
    count = min(max(_MAX_PAIRS // pairs, 2), len(layers))
    return [layers[round(place)] for place in np.linspace(0, len(layers) - 1, count)]


def _coactivation(profile: Profile, layer: int) -> NDArray[np.float64]:
    """[experts, experts] percentage of a row's tokens that also visit the column's expert; NaN on the diagonal."""
    table = sum(profile.layer(name, layer, "coactivation").double().numpy() for name in profile.names)
    table = np.asarray(table)
    share: NDArray[np.float64] = table / np.maximum(np.diag(table), 1)[:, None] * 100
    np.fill_diagonal(share, np.nan)
    return share


def _similarity(profile: Profile, layer: int) -> NDArray[np.float64] | None:
    similarity = profile.weights.get(f"layer.{layer}.similarity")
    if similarity is None:
        return None
    table: NDArray[np.float64] = similarity.double().numpy().copy()
    np.fill_diagonal(table, np.nan)
    return table
