"""Routers: from what the model reads of a prompt to the variant that continues it best."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from moqa.errors import MoqaError
from moqa.registry import Registry

# what a router reads of each token: its row of the model's embedding, or the experts that it is routed to
Reads = Literal["rows", "routing"]
LONGEST = 128  # tokens: of a longer prompt, its end


class Router(nn.Module, ABC):
    """A router, for a number of variants. It is causal: what it says after a token depends on no later one.

    >>> ROUTERS.find("linear")(features=256, variants=5)(torch.randn(2, 40, 256)).shape
    torch.Size([2, 40, 5])

    Attributes:
        reads: what it reads of each token.
        rate: learning rate.
    """

    reads: ClassVar[Reads]
    rate: ClassVar[float]

    @abstractmethod
    def __init__(self, features: int, variants: int) -> None:
        super().__init__()

    @abstractmethod
    def see(self, samples: Tensor) -> None:
        """Set what depends on the scale of the features, from [windows, tokens, features] to train on."""

    @abstractmethod
    def encode(self, features: Tensor) -> Tensor:
        """[windows, tokens, features] -> [windows, tokens, encoded]; each depends on no later token."""

    @abstractmethod
    def answer(self, pooled: Tensor) -> Tensor:
        """[..., encoded] means -> [..., variants] logits."""

    def forward(self, features: Tensor) -> Tensor:
        """[windows, tokens, features] -> [windows, tokens, variants] logits after each token."""
        return self.answer(causal_mean(self.encode(features)))

    def after(self, features: Tensor) -> Tensor:
        """[prompts, tokens, features] -> [prompts, variants] logits after the last token."""
        return self.answer(self.encode(features).mean(-2))


ROUTERS: Registry[type[Router]] = Registry("--router", {
    "encoder": "moqa.mixture.encoder", "linear": "moqa.mixture.pooled", "histogram": "moqa.mixture.pooled",
})  # fmt: skip
# as good as the encoder on the reference model, in a fourteenth of its bytes and time (docs/results/mixture.md)
DEFAULT_ROUTER = "linear"


def causal_mean(features: Tensor) -> Tensor:
    """[..., tokens, features] mean of each token's features and those of all before it.

    >>> causal_mean(torch.tensor([[1.0], [3.0], [5.0]]))
    tensor([[1.],
            [2.],
            [3.]])
    """
    counts = torch.arange(1, features.shape[-2] + 1, dtype=features.dtype)
    return features.cumsum(-2) / counts[:, None]


def stored(router: Router) -> dict[str, Tensor]:
    """What a file stores of a router: bfloat16."""
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in router.state_dict().items()}


def restored(kind: str, features: int, variants: int, tensors: Mapping[str, Tensor]) -> Router:
    """A router from what a file stores.

    Raises:
        MoqaError: if the tensors are not those of such a router.
    """
    router = ROUTERS.find(kind)(features, variants)
    wanted = {name: tuple(tensor.shape) for name, tensor in router.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if different:
        name = different[0]
        raise MoqaError(
            f"the router has {name} {found.get(name, 'missing')}", f"{variants} variants need {wanted.get(name)}"
        )
    router.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return router.eval().requires_grad_(False)
