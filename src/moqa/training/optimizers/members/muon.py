"""`muon`: steps of matrices that are orthogonal."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from moqa.training.optimizers.members.adamw import adamw
from moqa.training.optimizers.registry import optimizer


@optimizer("muon")
def muon(parameters: Sequence[nn.Parameter], rate: float) -> list[Optimizer]:
    """Muon for matrices, scaled to the lengths of AdamW's steps (arXiv 2502.16982); AdamW for everything else."""
    matrices = [parameter for parameter in parameters if parameter.dim() == 2]
    others = [parameter for parameter in parameters if parameter.dim() != 2]
    found: list[Optimizer] = adamw(others, rate) if others else []
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return found
