"""What the experts and channels of a block contribute on a distribution, and how similar its experts are."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from moqa.models.experts import PROJECTIONS, ExpertRun
from moqa.models.view import ModelView

# rows of all experts' matrices that are compared at a time
_ROWS = 64


class LayerStatistics:
    """Running sums over the tokens of one distribution in one block: the three stages of MoQa's analysis.

    >>> from moqa.models.experts import observed
    >>> statistics = LayerStatistics(down_norms=torch.ones(16, 256))
    >>> with observed(view.experts(0), statistics):
    ...     _ = stages.run_block(0, hidden)
    >>> round(float(expert_significance(statistics.sums["channel"]).sum()), 4)
    1.0

    Stage (a), sparse activation: `tokens` and `gate_mass` per expert. Stage (b), data-to-parameter mapping: `channel`.
    Stage (c), inter-expert correlation: `coactivation`.

    Args:
        down_norms: [experts, channels] norm of each column of `down_proj`, float32.

    Attributes:
        sums: by the name of the statistic.

    MoQa (arXiv 2503.21135) leaves the channel term S_ch open; ours is the size of what channel c of expert j adds to
    the block's output for token i: gate_ij * |h_ijc| * ||W_down[:, c]||, see docs/methods/moqa.md.
    """

    def __init__(self, down_norms: Tensor) -> None:
        experts, self._norms = len(down_norms), down_norms
        self.sums = {
            "tokens": torch.zeros(experts, dtype=torch.int64),
            "gate_mass": torch.zeros(experts),
            "channel": torch.zeros_like(down_norms),
            "coactivation": torch.zeros(experts, experts),
        }

    def routed(self, index: Tensor, weights: Tensor) -> None:
        """Count a batch's routing: [tokens, top_k] expert indices and gate weights."""
        experts = len(self._norms)
        self.sums["tokens"] += torch.bincount(index.flatten(), minlength=experts)[:experts]
        self.sums["gate_mass"].index_add_(0, index.flatten(), weights.flatten().float())
        visited = one_hot(index, experts).sum(1).clamp_max(1).float()
        self.sums["coactivation"] += visited.T @ visited

    def expert(self, run: ExpertRun) -> None:
        """Add one expert's activations to its channels."""
        self.sums["channel"][run.expert] += (run.inner.abs() * run.gate).sum(0) * self._norms[run.expert]


def expert_significance(channel: Tensor) -> Tensor:
    """Share of a block's output that each expert contributes on a distribution.

    >>> expert_significance(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    tensor([0.7500, 0.2500])

    Args:
        channel: [experts, channels] summed significance of every channel, float32.

    Returns:
        [experts] shares that sum to 1; experts without tokens get 0.

    MoQa (arXiv 2503.21135), equation 1.
    """
    total = channel.sum()
    return channel.sum(1) / total if total > 0 else torch.full((len(channel),), 1.0 / len(channel))


def expert_similarity(parts: Iterable[Tensor]) -> Tensor:
    """Cosine similarity between the weights of every two experts of a block.

    >>> expert_similarity([torch.eye(2)])
    tensor([[1., 0.],
            [0., 1.]])

    Args:
        parts: the experts' weights in parts, each [experts, weights].

    Returns:
        [experts, experts] from -1 to 1, float32.
    """
    products: Tensor = sum(part.float() @ part.float().T for part in parts)  # type: ignore[assignment]
    norms = products.diagonal().sqrt().clamp_min(1e-12)
    return products / norms[:, None] / norms


def layer_similarity(view: ModelView, layer: int) -> Tensor:
    """`expert_similarity` of a block, some rows of all experts at a time."""

    def parts() -> Iterator[Tensor]:
        for projection in PROJECTIONS:
            matrices = [
                view.weight(u) for u in view.block_units(layer) if u.expert is not None and u.projection == projection
            ]
            for rows in range(0, matrices[0].shape[0], _ROWS):
                yield torch.stack([matrix[rows : rows + _ROWS].flatten() for matrix in matrices])

    return expert_similarity(parts())
