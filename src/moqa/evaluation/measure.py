"""Quality of a model on held-out windows: its likelihood, and its divergence from the original."""

import math
from dataclasses import dataclass, field

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from moqa.calibration.hidden import HiddenStates
from moqa.data import Windows
from moqa.models.layerwise import LayerwiseModel
from moqa.progress import Report
from moqa.runtime.packed import unpacked
from moqa.storage.in_memory import InMemoryRun
from moqa.tasks import Samples


@torch.no_grad()
def final_hidden(model: nn.Module, samples: list[Samples], report: Report) -> dict[str, HiddenStates]:
    """Outputs of the last block for samples; one block at a time, so that each packed matrix is unpacked once.

    Args:
        model: original or packed.
        samples: one entry per distribution.
        report: called per block.

    Returns:
        Distribution -> its hidden states.
    """
    stages = LayerwiseModel(model)
    hidden = {s.name: HiddenStates(stages, InMemoryRun(), s.name, stages.task.batches(s.inputs)) for s in samples}
    for layer in range(stages.depth):
        report("evaluate", layer, stages.depth)
        with unpacked(stages.blocks[layer]):
            for states in hidden.values():
                states.advance(layer, keep=False)
    report("evaluate", stages.depth, stages.depth)
    return hidden


@dataclass
class Reference:
    """The original's outputs on some windows, kept as hidden states because logits would need more memory.

    >>> windows = [Windows("wiki", tokens, text_bytes=120, hashes=np.zeros(0, np.uint64))]
    >>> reference = Reference.of(view.model, windows, report)
    >>> scores(model, windows, reference, report)["wiki"].kl_divergence > 0
    True
    """

    model: nn.Module
    windows: list[Samples]
    hidden: dict[str, HiddenStates] = field(repr=False)

    @classmethod
    def of(cls, model: nn.Module, windows: list[Samples], report: Report) -> "Reference":
        """Run the original once."""
        return cls(model, windows, final_hidden(model, windows, report))


class Quality(BaseModel, frozen=True):
    """Quality of a model on one distribution."""

    perplexity: float = Field(description="exponential of the mean negative log-likelihood of a token, or of a label")
    bits_per_byte: float | None = Field(
        None, description="negative log-likelihood in bits per byte of text", exclude_if=lambda value: value is None
    )
    accuracy: float | None = Field(
        None, description="share of images whose label is ranked first", exclude_if=lambda value: value is None
    )
    kl_divergence: float | None = Field(
        description="mean of KL(original || model) per prediction, nats; None: no reference"
    )
    top1_agreement: float | None = Field(
        description="share of predictions where both rank the same class first; None: no reference"
    )
    tokens: int = Field(description="predictions: tokens, or images")


@torch.no_grad()
def scores(model: nn.Module, windows: list[Samples], reference: Reference | None, report: Report) -> dict[str, Quality]:
    """Quality of a model on every distribution.

    Args:
        model: original or packed.
        windows: one entry per distribution.
        reference: the original's outputs on the same windows.
        report: called per layer.
    """
    stages = LayerwiseModel(model)
    if reference is None:
        hidden = final_hidden(model, windows, report)
        return {window.name: quality(window, hidden[window.name], stages) for window in windows}
    same, answers = reference.model is model, reference.hidden
    hidden = answers if same else final_hidden(model, windows, report)
    own = stages if same else LayerwiseModel(reference.model)
    return {w.name: quality(w, hidden[w.name], stages, answers[w.name], own) for w in windows}


@torch.no_grad()
def divergences(model: nn.Module, reference: Reference, report: Report) -> dict[str, Tensor]:
    """KL divergence from the original of every window by itself: distribution -> [windows], nats per prediction.

    >>> divergences(view.model, reference, quiet)["wiki"].abs().max() < 1e-6  # doctest: +SKIP
    tensor(True)

    Args:
        model: original or packed.
        reference: the original's outputs.
        report: called per layer.
    """
    stages, own = LayerwiseModel(model), LayerwiseModel(reference.model)
    hidden, found = final_hidden(model, reference.windows, report), {}
    for window in reference.windows:
        parts, states = [], hidden[window.name]
        for number in range(len(states)):
            state = states.at(stages.depth, number)
            true = _log_probabilities(own, reference.hidden[window.name].at(own.depth, number))
            each = (true.exp() * (true - _log_probabilities(stages, state))).sum(1)
            parts.append(each.reshape(len(state), -1).mean(1))
        found[window.name] = torch.cat(parts)
    return found


def quality(
    window: Samples,
    hidden: HiddenStates,
    stages: LayerwiseModel,
    answers: HiddenStates | None = None,
    own: LayerwiseModel | None = None,
) -> Quality:
    """Quality of a model on one distribution, from the last layer's outputs.

    Args:
        window: the distribution.
        hidden: outputs of the last layer of the model.
        stages: of the model.
        answers: outputs of the last layer of the original.
        own: stages of the original; the same object as `stages` if the model is the original.
    """
    loss = divergence = agreement = 0.0
    tokens = right = 0
    for number, labels in enumerate(stages.task.targets(window)):
        logp = _log_probabilities(stages, hidden.at(stages.depth, number))
        right += int((logp.argmax(1) == labels).sum())
        loss -= float(logp.gather(1, labels[:, None]).double().sum())
        tokens += len(labels)
        if own is not None and answers is not None:
            true = logp if own is stages else _log_probabilities(own, answers.at(own.depth, number))
            divergence += float((true.exp() * (true - logp)).sum(1).double().sum())
            agreement += int((true.argmax(1) == logp.argmax(1)).sum())
    compared = own is not None
    return Quality(
        perplexity=math.exp(min(loss / tokens, 700.0)),
        bits_per_byte=loss / math.log(2) / max(window.text_bytes, 1) if isinstance(window, Windows) else None,
        accuracy=None if isinstance(window, Windows) else right / tokens,
        kl_divergence=max(divergence / tokens, 0.0) if compared else None,
        top1_agreement=agreement / tokens if compared else None,
        tokens=tokens,
    )


def _log_probabilities(stages: LayerwiseModel, hidden: Tensor) -> Tensor:
    """[predictions, classes] log-probabilities of all predictions with labels, float32."""
    return stages.task.scored(stages.head(hidden)).float().log_softmax(-1)
