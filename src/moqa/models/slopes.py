"""Slopes of the activation between the products of a feed-forward part."""

from collections.abc import Callable

import torch
from torch import Tensor

# projections whose outputs the activation combines
COMBINED = ("gate_proj", "up_proj")


def slopes(combine: Callable[[Tensor], Tensor], gate_up: Tensor) -> Tensor:
    """Derivatives of an activation that combines gates and ups, for each of them.

    >>> slopes(lambda x: x[:, :1] * x[:, 1:], torch.tensor([[2.0, 3.0]]))
    tensor([[3., 2.]])

    Args:
        combine: function of [tokens, 2 * width]; an element of its result depends on one gate and one up.
        gate_up: [tokens, 2 * width].
    """
    with torch.enable_grad():
        gate_up = gate_up.detach().float().requires_grad_(True)
        return torch.autograd.grad(combine(gate_up).sum(), gate_up)[0]
