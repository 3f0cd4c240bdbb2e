"""How little a block changes its hidden states: a score that is learned from some tokens and read on others."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss

from moqa.calibration.hidden import HiddenStates
from moqa.errors import MoqaError
from moqa.models.layerwise import LayerwiseModel
from moqa.models.view import ModelView
from moqa.storage.in_memory import InMemoryRun

# of the scorer, as published: hidden features, learning rate, epochs without gain before it stops
_FEATURES, _RATE, _PATIENCE = 1024, 1e-4, 5
_EPOCHS, _BATCH = 60, 256


def block_similarity(view: ModelView, samples: Tensor) -> Tensor:
    """[blocks, 2] cosine similarity of a block's output and input, as a scorer predicts it and as it is.

    A block with a low similarity does much. The scorer sees a block's input only; it is trained on two thirds of the
    tokens, and predicts the rest.

    >>> block_similarity(view, tokens).shape
    torch.Size([6, 2])

    Args:
        view: the original.
        samples: what the model is called with, e.g. [windows, context] token ids.

    Raises:
        MoqaError: if blocks change the shape of hidden states.

    QuantMoE-Bench (arXiv 2406.08155): a perceptron with one hidden layer, tanh at its end.
    """
    stages = LayerwiseModel(view.model)
    hidden = HiddenStates(stages, InMemoryRun(), "scored", stages.task.batches(samples))
    found = []
    for layer in range(stages.depth):
        hidden.advance(layer)
        pairs = [(hidden.at(layer, number), hidden.at(layer + 1, number)) for number in range(len(hidden))]
        if pairs[0][0].shape != pairs[0][1].shape:
            raise MoqaError(
                f"block {layer} of {view.model.config.model_type} changes the shape of hidden states",
                "how much it does cannot be told by their similarity",
            )
        inputs = torch.cat([x.flatten(0, -2) for x, _ in pairs]).float()
        outputs = torch.cat([y.flatten(0, -2) for _, y in pairs]).float()
        hidden.forget(layer)
        found.append(_scored(inputs, cosine_similarity(inputs, outputs, dim=-1), seed=layer))
    return torch.stack(found)


def _scored(inputs: Tensor, similarity: Tensor, seed: int) -> Tensor:
    """[2] mean similarity of every third token as a scorer predicts it that learned from the others, and as it is."""
    held = torch.arange(len(inputs)) % 3 == 2
    inputs = inputs / inputs.square().mean().sqrt().clamp_min(1e-12)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        scorer = nn.Sequential(nn.Linear(inputs.shape[1], _FEATURES), nn.ReLU(), nn.Linear(_FEATURES, 1), nn.Tanh())
        optimizer = torch.optim.AdamW(scorer.parameters(), lr=_RATE)
        best, waited, learned = float("inf"), 0, (inputs[~held], similarity[~held])
        predicted = similarity[held]
        for _ in range(_EPOCHS):
            for part in torch.randperm(len(learned[0])).split(_BATCH):
                optimizer.zero_grad()
                mse_loss(scorer(learned[0][part])[:, 0], learned[1][part]).backward()
                optimizer.step()
            with torch.no_grad():
                now = scorer(inputs[held])[:, 0]
            error = float(mse_loss(now, similarity[held]))
            if error < best:
                best, waited, predicted = error, 0, now
            else:
                waited += 1
            if waited == _PATIENCE:
                break
    return torch.stack([predicted.mean(), similarity[held].mean()])
