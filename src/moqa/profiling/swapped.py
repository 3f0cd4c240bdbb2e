"""Divergence that is measured with one part of a block rounded and all else as in the original."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moqa.calibration.hidden import HiddenStates
from moqa.format.scheme import Scheme
from moqa.methods.grid import fit_grid
from moqa.models.layerwise import LayerwiseModel
from moqa.models.units import Unit
from moqa.models.view import ModelView
from moqa.profiling.sensitivity import PROBES, all_widths
from moqa.storage.in_memory import InMemoryRun


def swapped_part(role: str, projection: str) -> str:
    """Parts of a block that are rounded together: attention; what widens the hidden states; what narrows them.

    >>> swapped_part("expert", "gate_proj"), swapped_part("attention", "o_proj")
    ('expert up', 'attention')
    """
    if role == "attention":
        return role
    return f"{role} {'down' if projection.startswith(('down', 'w2', 'fc2')) else 'up'}"


def swapped_divergence(
    view: ModelView, samples: Tensor, scheme: Scheme, rounding: Tensor, widths: Sequence[int]
) -> Tensor:
    """[units, widths] KL divergence per prediction with a unit's part of its block rounded, shared among its units.

    The sum over the units of a part is what was measured for it, in nats. Measured are 1 to 4 bits; wider ones follow
    from the weights' rounding errors.

    Args:
        view: the original; its weights are as before in the end.
        samples: what the model is called with, e.g. [windows, context] token ids.
        scheme: group size and symmetry of the rounding.
        rounding: [units, widths] relative rounding errors of the weights.
        widths: of the result's columns.

    ExLlamaV3's optimizer measures parts of layers in this way (https://github.com/turboderp-org/exllamav3); it swaps
    units that are quantized completely, ours are rounded to nearest.
    """
    stages = LayerwiseModel(view.model)
    batches = stages.task.batches(samples)
    hidden = HiddenStates(stages, InMemoryRun(), "swapped", batches)
    for layer in range(stages.depth):
        hidden.advance(layer)
    true = [_logits(stages, hidden.at(stages.depth, number)) for number in range(len(batches))]
    probes = [width for width in PROBES if width in widths]
    units, probed = list(view.units.values()), torch.zeros(len(rounding), len(probes))
    for layer in range(stages.depth):
        parts: dict[str, list[int]] = {}
        for row, unit in enumerate(units):
            if unit.layer == layer:
                parts.setdefault(swapped_part(unit.role, unit.projection), []).append(row)
        for rows in parts.values():
            sizes = torch.tensor([float(view.weight(units[row]).numel()) for row in rows])
            for column, width in enumerate(probes):
                states = [hidden.at(layer, number) for number in range(len(batches))]
                found = _rounded(view, stages, [units[row] for row in rows], scheme.model_copy(
                    update={"width": width}), states, true)  # fmt: skip
                probed[rows, column] = found * sizes / sizes.sum()
    return all_widths(probed, rounding, probes, list(widths))


def _rounded(
    view: ModelView, stages: LayerwiseModel, units: list[Unit], scheme: Scheme, states: list[Tensor], true: list[Tensor]
) -> float:
    """KL divergence per prediction with some units of one block rounded."""
    before = [view.weight(unit).clone() for unit in units]
    for unit, weight in zip(units, before, strict=True):
        rounded = fit_grid(weight.float(), scheme)
        view.set_weight(unit, rounded.grid.decode(rounded.integers))
    for layer in range(units[0].layer, stages.depth):
        states = [stages.run_block(layer, state) for state in states]
        if layer == units[0].layer:
            for unit, weight in zip(units, before, strict=True):
                view.set_weight(unit, weight)
    total = count = 0.0
    for state, wanted in zip(states, true, strict=True):
        total += float((wanted.exp() * (wanted - _logits(stages, state))).sum())
        count += len(wanted)
    return max(total / count, 0.0)


def _logits(stages: LayerwiseModel, hidden: Tensor) -> Tensor:
    """[predictions, classes] log-probabilities, float32."""
    return stages.task.scored(stages.head(hidden)).float().log_softmax(-1)
