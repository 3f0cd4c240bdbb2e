"""How far decoded weights are from the original's, whatever tool made them: one yardstick for benchmarks/peers.py."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moqa.models.layerwise import LayerwiseModel
from moqa.models.units import Unit
from moqa.models.view import ModelView, open_model


class Original:
    """A model's answers on held-out windows, from which every result is measured.

    >>> Original(Path("reference/model"), tokens).compare(weights, bits=4, group=64)["kl"]
    """

    def __init__(self, folder: Path, tokens: Tensor) -> None:
        self.folder, self.tokens = folder, tokens
        self._answers = list(_answers(open_model(folder), tokens))

    def compare(self, dense: Mapping[str, Tensor], bits: int, group: int) -> dict[str, Any]:
        """Mean KL divergence per token, squared error of each layer's output over its square, errors of the layers
        before it included, and how many matrices are on a grid of these bits; what is not given stays original."""
        view = open_model(self.folder)
        unknown = dense.keys() - {f"{name}.weight" for name in view.units}
        if unknown:
            raise ValueError(f"{min(unknown)} is quantized, which other tools keep")
        given = {unit: dense[f"{name}.weight"] for name, unit in view.units.items() if f"{name}.weight" in dense}
        for unit, weight in given.items():
            view.set_weight(unit, weight)
        divergence, squares = 0.0, torch.zeros(len(view.blocks), 2, dtype=torch.float64)
        for (states, logp), (others, other) in zip(self._answers, _answers(view, self.tokens), strict=True):
            divergence += float((logp.exp() * (logp - other)).sum(dtype=torch.float64))
            pairs = zip(states, others, strict=True)
            squares += torch.tensor([[(b - a).square().sum(), a.square().sum()] for a, b in pairs])
        return {
            "kl": divergence / self.tokens.numel(),
            "layer_errors": (squares[:, 0] / squares[:, 1]).tolist(),
            "matrices": sum(_on_grid(unit, weight[0], bits, group) for unit, weight in given.items()),
            "matrices_of_model": len(view.units),
        }


def _on_grid(unit: Unit, row: Tensor, bits: int, group: int) -> bool:
    """Whether a row has no more values than the bits of its unit allow."""
    width = bits if unit.role == "expert" else max(bits, 4)
    return len(row.unique()) <= 2**width * (len(row) // group)


@torch.no_grad()
def _answers(view: ModelView, tokens: Tensor) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Every layer's output and the log-probabilities, batch by batch."""
    stages = LayerwiseModel(view.model)
    for batch in stages.task.batches(tokens):
        states = [stages.embed(batch)]
        for layer in range(stages.depth):
            states.append(stages.run_block(layer, states[-1]))
        yield states[1:], stages.head(states[-1]).log_softmax(-1)
