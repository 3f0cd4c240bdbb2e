"""`sgd`: steps along the gradient, with momentum."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moqa.training.optimizers.registry import optimizer

_MOMENTUM = 0.9


class _UnitSGD(torch.optim.SGD):
    """SGD in units of the first gradient, so that one rate suits losses of any size.

    The first step has a root mean square of the rate, as the first of AdamW has.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        (group,) = self.param_groups
        if "unit" not in group:
            gradients = torch.cat([p.grad.flatten() for p in group["params"] if p.grad is not None])
            group["unit"] = float(gradients.square().mean().sqrt()) or 1.0
        rate = group["lr"]
        group["lr"] = rate / group["unit"]
        loss: float | Tensor | None = super().step(closure)
        group["lr"] = rate
        return None if loss is None else float(loss)


@optimizer("sgd")
def sgd(parameters: Sequence[nn.Parameter], rate: float) -> list[Optimizer]:
    """Gradient descent with Nesterov's momentum, in units of the first gradient."""
    return [_UnitSGD(parameters, lr=rate, momentum=_MOMENTUM, nesterov=True)]
