"""Scores of weight matrices that need no data."""

import torch
from torch import Tensor

from moqa.models.view import ModelView

# share of the largest eigenvalues whose tail is fitted, and their smallest number
_TAIL, _FEWEST = 0.1, 10


def outlier_scores(view: ModelView, layer: int) -> Tensor:
    """[units] largest ratio of a column's largest to its mean absolute weight, for the units of a block.

    >>> outlier_scores(view, 0).min() >= 1
    tensor(True)

    QuantMoE-Bench (arXiv 2406.08155), the score of linear weights.
    """
    found = []
    for unit in view.block_units(layer):
        size = view.weight(unit).float().abs()
        found.append((size.amax(0) / size.mean(0).clamp_min(1e-30)).max())
    return torch.stack(found)


def spectra(view: ModelView, layer: int) -> Tensor:
    """[units, 2] exponent of the spectrum's tail, and variance of the weights, for the units of a block.

    >>> spectra(view, 0).shape
    torch.Size([52, 2])

    AlphaQ (arXiv 2606.04980) plans by these two.
    """
    weights = [view.weight(unit).float() for unit in view.block_units(layer)]
    return torch.stack([torch.tensor([tail_exponent(weight), float(weight.var())]) for weight in weights])


def tail_exponent(weight: Tensor) -> float:
    """Hill's estimate of the exponent of a matrix's spectral tail: 1 + k / sum of log(l_i / l_k+1).

    Few eigenvalues that stand out make it small. The l_i are the k largest eigenvalues of the matrix times its
    transpose, a tenth of all, but at least 10.

    >>> round(tail_exponent(torch.diag(torch.arange(1.0, 101.0))), 1)
    9.5

    Args:
        weight: [out, in], float32.
    """
    gram = weight @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weight
    values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(1e-12)
    count = max(1, min(max(_FEWEST, int(_TAIL * len(values))), len(values) - 1))
    if len(values) < 2:
        return 1.0
    return 1 + count / max(float((values[:count] / values[count]).log().sum()), 1e-12)
