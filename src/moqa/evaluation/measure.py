"""Quality of a model on held-out windows: likelihood, and how far it is from the original."""

import math
from dataclasses import dataclass, field

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from moqa.data import Windows
from moqa.models.layerwise import LayerwiseModel, batches
from moqa.progress import Report
from moqa.runtime.packed import unpacked


@torch.no_grad()
def final_hidden(model: nn.Module, windows: list[Windows], report: Report) -> dict[str, list[Tensor]]:
    """Last layer's output for every window, one layer at a time so that each packed matrix is unpacked once.

    Args:
        model: original or packed.
        windows: one entry per distribution.
        report: called per layer.

    Returns:
        Distribution -> list of [batch, context, features].
    """
    stages = LayerwiseModel(model)
    hidden = {w.name: [stages.embed(batch) for batch in batches(w.tokens)] for w in windows}
    for layer in range(stages.depth):
        report("evaluate", layer, stages.depth)
        with unpacked(stages.layers[layer]):
            for parts in hidden.values():
                for index, part in enumerate(parts):
                    parts[index] = stages.layer(layer, part)
    report("evaluate", stages.depth, stages.depth)
    return hidden


@dataclass
class Reference:
    """The original model's answers on some windows, kept as hidden states so that logits need no memory.

    >>> reference = Reference.of(original, windows, report)
    >>> scores(packed, windows, reference, report)["wiki"].kl_divergence
    """

    model: nn.Module
    windows: list[Windows]
    hidden: dict[str, list[Tensor]] = field(repr=False)

    @classmethod
    def of(cls, model: nn.Module, windows: list[Windows], report: Report) -> "Reference":
        """Run the original once."""
        return cls(model, windows, final_hidden(model, windows, report))


class Quality(BaseModel, frozen=True):
    """Quality of a model on one distribution."""

    perplexity: float = Field(description="exponential of the mean negative log-likelihood per token")
    bits_per_byte: float = Field(description="negative log-likelihood in bits per byte of text")
    kl_divergence: float | None = Field(description="mean of KL(original || model) per token, nats; None: no reference")
    top1_agreement: float | None = Field(description="share of tokens where both rank the same first; None likewise")
    tokens: int = Field(description="predicted tokens")


@torch.no_grad()
def scores(model: nn.Module, windows: list[Windows], reference: Reference | None, report: Report) -> dict[str, Quality]:
    """Quality of a model on every distribution.

    Args:
        model: original or packed.
        windows: one entry per distribution.
        reference: the original's answers on the same windows.
        report: called per layer.
    """
    same = reference is not None and reference.model is model
    hidden = reference.hidden if reference is not None and same else final_hidden(model, windows, report)
    stages = LayerwiseModel(model)
    own = LayerwiseModel(reference.model) if reference is not None else None
    found = {}
    for window in windows:
        loss = divergence = agreement = 0.0
        tokens = 0
        answers = reference.hidden[window.name] if reference is not None else [None] * len(hidden[window.name])
        for batch, part, answer in zip(batches(window.tokens), hidden[window.name], answers, strict=True):
            logp = _log_probabilities(stages, part)
            labels = batch[:, 1:].reshape(-1)
            loss -= float(logp.gather(1, labels[:, None]).double().sum())
            tokens += len(labels)
            if own is not None and answer is not None:
                true = logp if same else _log_probabilities(own, answer)
                divergence += float((true.exp() * (true - logp)).sum(1).double().sum())
                agreement += int((true.argmax(1) == logp.argmax(1)).sum())
        compared = reference is not None
        found[window.name] = Quality(
            perplexity=math.exp(min(loss / tokens, 700.0)),
            bits_per_byte=loss / math.log(2) / max(window.text_bytes, 1),
            kl_divergence=max(divergence / tokens, 0.0) if compared else None,
            top1_agreement=agreement / tokens if compared else None,
            tokens=tokens,
        )
    return found


def _log_probabilities(stages: LayerwiseModel, hidden: Tensor) -> Tensor:
    """[positions, vocabulary] log-probabilities of every token but the first of each window, float32."""
    return stages.head(hidden)[:, :-1].flatten(0, 1).float().log_softmax(-1)
