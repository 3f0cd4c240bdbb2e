"""How far predictions are from those of the original."""

from torch import Tensor

from moqa.models.layerwise import LayerwiseModel


def log_probabilities(stages: LayerwiseModel, hidden: Tensor) -> Tensor:
    """[predictions, classes] what the head predicts from the output of the last block.

    >>> log_probabilities(stages, torch.randn(2, 16, 256)).exp().sum(-1).allclose(torch.ones(32))
    True
    """
    return stages.task.predictions(stages.head(hidden)).float().log_softmax(-1)


def divergence(truth: Tensor, found: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence in nats of some log-probabilities from others, [predictions, classes].

    >>> truth = torch.tensor([[0.5, 0.5]]).log()
    >>> float(divergence(truth, truth))
    0.0
    """
    return (truth.exp() * (truth - found)).sum(-1).mean()
