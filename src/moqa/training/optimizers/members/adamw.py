"""`adamw`: Adam, which divides every number's gradients by their own size."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from moqa.training.optimizers.registry import optimizer

_BETAS = (0.9, 0.95)


@optimizer("adamw")
def adamw(parameters: Sequence[nn.Parameter], rate: float) -> list[Optimizer]:
    """AdamW (arXiv 1711.05101), without decay: every number moves by about the rate."""
    return [torch.optim.AdamW(parameters, lr=rate, betas=_BETAS, weight_decay=0.0)]
