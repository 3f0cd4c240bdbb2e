"""Routers: from a prompt, or an image, to the variant that answers it best."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from moqa.errors import MoqaError
from moqa.mixture.familiar import Familiarity
from moqa.registry import Registry
from moqa.tasks import Task

# what a router reads: of each token its row of the model's embedding, or the experts that it is routed to; or an image
Reads = Literal["rows", "routing", "pixels"]
LONGEST = 128  # tokens: of a longer prompt, its end
_KNOWN = "familiar.directions"
SIDE = 32  # pixels: an image of any other size is averaged, or spread, over so many


class Router(nn.Module, ABC):
    """A router, for a number of variants. It is causal: what it says after a token depends on no later one.

    For a router an image is a text of one token, whose features are [channels, 32, 32] pixels.

    >>> ROUTERS.find("linear")(features=256, variants=5)(torch.randn(2, 40, 256)).shape
    torch.Size([2, 40, 5])

    Attributes:
        reads: what it reads.
        rate: learning rate.
        known_by_encoded: whether a novel input is told by what `encode` makes of it; else by the features themselves.
        familiar: tells known inputs from novel ones, once it is trained; None: all count as known.
    """

    reads: ClassVar[Reads]
    rate: ClassVar[float]
    known_by_encoded: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, features: int, variants: int) -> None:
        super().__init__()
        self.familiar: Familiarity | None = None

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
        """[prompts, tokens, features] -> [prompts, variants] confidence in each variant after the last token."""
        encoded = self.encode(features)
        shares = self.answer(encoded.mean(-2)).softmax(-1)
        return self._trusted(shares, self.evidence(features, encoded).mean(-2), features.shape[1])

    def confidences(self, features: Tensor) -> Tensor:
        """[windows, tokens, features] -> [windows, tokens, variants] confidence in each variant after each token.

        It is the probability of the variant times the familiarity of what was read.
        """
        encoded, tokens = self.encode(features), torch.arange(1, features.shape[1] + 1)
        shares = self.answer(causal_mean(encoded)).softmax(-1)
        return self._trusted(shares, causal_mean(self.evidence(features, encoded)), tokens)

    def evidence(self, features: Tensor, encoded: Tensor) -> Tensor:
        """What a novel input is told by, of each token."""
        return encoded if self.known_by_encoded else features

    def _trusted(self, shares: Tensor, means: Tensor, tokens: Tensor | int) -> Tensor:
        return shares if self.familiar is None else shares * self.familiar(means, tokens)[..., None]


ROUTERS: Registry[type[Router]] = Registry("--router", {
    "encoder": "moqa.mixture.encoder", "linear": "moqa.mixture.pooled", "histogram": "moqa.mixture.pooled",
    "se-resnet": "moqa.mixture.se_resnet",
})  # fmt: skip
# task -> routers of its models, the default one first: among adjustments of the reference model it is as good as the
# encoder, in a fourteenth of its bytes and time (docs/results/mixture.md)
ROUTERS_OF = {"causal_lm": ("linear", "encoder", "histogram"), "image_classification": ("se-resnet",)}


def router_of(task: Task, asked: str | None) -> str:
    """The router of a model: the one that was asked for, or the default one of its task.

    >>> from moqa.tasks import find_task
    >>> router_of(find_task("image_classification"), None)
    'se-resnet'

    Raises:
        MoqaError: if it is unknown, or for other models.
    """
    if asked is not None:
        ROUTERS.find(asked)
    fitting = ROUTERS_OF[task.name]
    if asked not in (None, *fitting):
        raise MoqaError(f"--router {asked} does not read what {task.kind}s read", f"give {' or '.join(fitting)}")
    return asked or fitting[0]


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
    known = tensors.get(_KNOWN)
    if known is not None and known.dim() == 2:  # an older router has none
        router.familiar = Familiarity(*known.shape)
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
