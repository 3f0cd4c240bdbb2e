"""`random`: keep experts by chance, the control for every other way."""

import torch
from torch import Tensor

from moqa.reduction.members.frequency import kept
from moqa.reduction.registry import Routed, reduction


@reduction("random", is_control=True)
def random(seen: Routed, count: int, seed: int) -> Tensor:
    """Keep experts by chance, drop the others."""
    experts = len(seen.tokens)
    return kept(torch.randperm(experts, generator=torch.Generator().manual_seed(seed))[:count], experts)
