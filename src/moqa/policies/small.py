"""A small policy: a vision transformer, a projector, a language model and an action head, 1.3 million weights.

Its modules have the names of the parts, so it is also the example of what `moqa.policies.parts` looks for in others.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import PretrainedConfig, PreTrainedModel

from moqa.errors import MoqaError

MODEL_TYPE = "moqa_policy"
PAD = "<pad>"


class SmallPolicyConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is not followed
    """Settings of a small policy.

    >>> SmallPolicyConfig(words=["<pad>", "open", "the", "door"]).image_size
    72

    Args:
        image_size: pixels of a side; divided by the strides of the stem, 12.
        stem: channels of the convolutions before the vision transformer; the last one is its width.
        glimpses: weighted sums of all patches that the vision transformer works on.
        vision_layers: layers of the vision transformer.
        width: of the language model.
        layers: of the language model.
        heads: of attention, in both.
        words: the vocabulary; the first one fills short instructions up.
        most_words: words of an instruction.
        picture_gain: what a pixel's difference from the average picture is multiplied by.
        state_mean: of each number of the robot's state.
        state_scale: what a deviation from it is divided by.
        action_size: numbers of an action.
        chunk: actions that are predicted at once.
        robot: that the policy was made for.
        others: of every configuration of transformers.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        *,
        image_size: int = 72,
        stem: tuple[int, ...] = (32, 64, 96),
        glimpses: int = 12,
        vision_layers: int = 3,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        words: list[str] | None = None,
        most_words: int = 6,
        picture_gain: float = 1.0,
        state_mean: list[float] | None = None,
        state_scale: list[float] | None = None,
        action_size: int = 4,
        chunk: int = 8,
        robot: str = "",
        **others: Any,
    ) -> None:
        self.image_size, self.stem, self.glimpses, self.vision_layers = image_size, list(stem), glimpses, vision_layers
        self.width, self.layers, self.heads = width, layers, heads
        self.words, self.most_words, self.picture_gain = list(words or [PAD]), most_words, picture_gain
        self.state_mean, self.state_scale = list(state_mean or [0.0] * 4), list(state_scale or [1.0] * 4)
        self.action_size, self.chunk, self.robot = action_size, chunk, robot
        super().__init__(**others)

    def ids(self, instruction: str) -> Tensor:
        """[words] number of each word of an instruction, filled up.

        >>> SmallPolicyConfig(words=["<pad>", "open", "the", "door"]).ids("open the door")
        tensor([1, 2, 3, 0, 0, 0])

        Raises:
            MoqaError: if it has an unknown word, or too many.
        """
        words = instruction.split()
        unknown = next((word for word in words if word not in self.words), None)
        if unknown is not None:
            raise MoqaError(
                f"the policy does not know '{unknown}' of '{instruction}'", f"it knows {_listed(self.words)}"
            )
        if len(words) > self.most_words:
            raise MoqaError(f"'{instruction}' has {len(words)} words", f"the policy takes {self.most_words}")
        numbers = [self.words.index(word) for word in words]
        return torch.tensor(numbers + [0] * (self.most_words - len(words)))


def _listed(words: list[str]) -> str:
    return ", ".join(words[1:30])


class TransformerLayer(nn.Module):
    """Attention to all positions, then a feed-forward part; both after a norm.

    >>> TransformerLayer(64, heads=2)(torch.zeros(1, 5, 64)).shape
    torch.Size([1, 5, 64])
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.o_proj = nn.Linear(width, width)
        self.up_proj, self.down_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, positions, width] -> the same."""
        normed = self.attention_norm(x)
        q, k, v = (
            part(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        # so few positions are fastest in plain steps: torch's fused attention takes half of a training step
        mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down_proj(gelu(self.up_proj(self.mlp_norm(x))))
        return out


class VisionEncoder(nn.Module):
    """Convolutions that make patches, sums of these over all places, then a transformer.

    What one camera sees is nearly always the same, so it begins with the difference from the average picture; and where
    a thing is becomes a number of a glimpse, which is learned much sooner than attention to a few of many patches.

    >>> VisionEncoder(SmallPolicyConfig())(torch.zeros(1, 3, 72, 72)).shape
    torch.Size([1, 12, 96])
    """

    def __init__(self, config: SmallPolicyConfig) -> None:
        super().__init__()
        first, second, width = config.stem
        sizes = (3, first, 5, 3), (first, second, 3, 2), (second, width, 3, 2)
        self.stem = nn.ModuleList(nn.Conv2d(*size, padding=1) for size in sizes)
        self.register_buffer("average", torch.zeros(3, config.image_size, config.image_size))
        self.gain = config.picture_gain
        self.glimpses = nn.Linear((config.image_size // 12) ** 2, config.glimpses)
        self.glimpse_norm = nn.LayerNorm(width)
        self.position = nn.Parameter(torch.zeros(config.glimpses, width))
        self.layers = nn.ModuleList(TransformerLayer(width, config.heads) for _ in range(config.vision_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """[batch, 3, height, width] from 0 to 1 -> [batch, glimpses, features]."""
        x = (images - self.get_buffer("average")) * self.gain
        for convolution in self.stem:
            x = gelu(convolution(x))
        x = self.glimpse_norm(self.glimpses(x.flatten(2)).mT) + self.position
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.norm(x)
        return out


class Projector(nn.Module):
    """From the features of vision to those of language.

    >>> Projector(128, 192)(torch.zeros(1, 12, 128)).shape
    torch.Size([1, 12, 192])
    """

    def __init__(self, vision: int, language: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(vision, 2 * language), nn.Linear(2 * language, language)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, glimpses, vision] -> [batch, glimpses, language]."""
        out: Tensor = self.down_proj(gelu(self.up_proj(x)))
        return out


class LanguageModel(nn.Module):
    """A transformer over the words of the instruction, projected glimpses, the state, and a place for the answer."""

    def __init__(self, config: SmallPolicyConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(len(config.words), config.width)
        self.state_in = nn.Linear(len(config.state_mean), config.width)
        self.answer = nn.Parameter(torch.zeros(config.width))
        self.position = nn.Parameter(torch.zeros(config.most_words + config.glimpses + 2, config.width))
        self.layers = nn.ModuleList(TransformerLayer(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, words: Tensor, seen: Tensor, state: Tensor) -> Tensor:
        """[batch, words] ids, [batch, glimpses, width], [batch, state] -> [batch, width] at the answer's place."""
        answer = self.answer.expand(len(words), 1, -1)
        x = torch.cat([self.embed_tokens(words), seen, self.state_in(state)[:, None], answer], 1) + self.position
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.norm(x[:, -1])
        return out


class ActionHead(nn.Module):
    """From the answer of the language model to actions.

    >>> ActionHead(192, 32)(torch.zeros(1, 192)).shape
    torch.Size([1, 32])
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, out)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width] -> [batch, numbers of all actions]."""
        out: Tensor = self.down_proj(gelu(self.up_proj(x)))
        return out


class SmallPolicy(PreTrainedModel):  # type: ignore[misc]
    """See the module's docstring.

    >>> policy = SmallPolicy(SmallPolicyConfig(words=["<pad>", "go"]))
    >>> policy(torch.zeros(1, 3, 72, 72), torch.zeros(1, 4), torch.zeros(1, 6, dtype=torch.int64)).shape
    torch.Size([1, 8, 4])
    """

    config_class = SmallPolicyConfig
    main_input_name = "images"
    _no_split_modules = ("TransformerLayer",)

    def __init__(self, config: SmallPolicyConfig) -> None:
        super().__init__(config)
        self.vision_encoder = VisionEncoder(config)
        self.projector = Projector(config.stem[-1], config.width)
        self.language_model = LanguageModel(config)
        self.action_head = ActionHead(config.width, config.chunk * config.action_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own, except for what is added to features, and convolutions, which would shrink what they see."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, VisionEncoder | LanguageModel):
            nn.init.normal_(module.position, std=0.1)

    def forward(self, images: Tensor, state: Tensor, words: Tensor) -> Tensor:
        """Actions for some observations.

        Args:
            images: [batch, 3, height, width] from 0 to 1.
            state: [batch, state] of the robot, in its own units.
            words: [batch, words] ids.

        Returns:
            [batch, chunk, action] from -1 to 1, as trained.
        """
        config = self.config
        mean, scale = (state.new_tensor(values) for values in (config.state_mean, config.state_scale))
        seen = self.projector(self.vision_encoder(images))
        answer = self.language_model(words, seen, (state - mean) / scale)
        actions: Tensor = self.action_head(answer)
        return actions.unflatten(-1, (config.chunk, config.action_size))
