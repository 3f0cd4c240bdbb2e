"""How well each variant answers: its loss at every token, or of every image, from one pass over the samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moqa.calibration.hidden import HiddenStates
from moqa.evaluation.measure import Reference, final_hidden
from moqa.models.layerwise import LayerwiseModel
from moqa.progress import Report
from moqa.tasks import Samples

LOSSES = ("divergence", "likelihood")


@dataclass(frozen=True)
class TokenLosses:
    """The losses of one model at every predicted token of one distribution's windows.

    Attributes:
        divergence: [windows, context - 1] KL(original || model), nats, float32; [images, 1] of images, as the others.
        likelihood: [windows, context - 1] negative log-likelihood of the text's own token or the image's own class,
            nats, float32.
        right: [windows, context - 1] whether the likeliest token, or class, is the original's, bool.
    """

    divergence: Tensor
    likelihood: Tensor
    right: Tensor

    def tensors(self, name: str) -> dict[str, Tensor]:
        """As they are saved, for a distribution."""
        return {f"{kind}.{name}": value for kind, value in vars(self).items()}

    @classmethod
    def among(cls, tensors: Mapping[str, Tensor], name: str) -> "TokenLosses":
        """Those of a distribution among saved tensors."""
        return cls(*(tensors[f"{kind}.{name}"] for kind in ("divergence", "likelihood", "right")))


def token_losses(
    model: torch.nn.Module, windows: Sequence[Samples], reference: Reference, report: Report
) -> dict[str, TokenLosses]:
    """Losses of a model on every distribution.

    >>> cut = [cut_windows(wiki, tokenizer, 256, 4)]  # doctest: +SKIP
    >>> token_losses(model, cut, Reference.of(original, cut, quiet), quiet)["wiki"].divergence.shape
    torch.Size([4, 255])

    Args:
        model: a packed model, with the variant in use that is measured.
        windows: of each distribution.
        reference: the original's outputs on these windows.
        report: called per block.
    """
    stages = LayerwiseModel(model)
    hidden = final_hidden(model, list(windows), report)
    return {w.name: compared(w, {"": (stages, hidden[w.name])}, reference)[""] for w in windows}


@torch.no_grad()
def compared(
    window: Samples, models: Mapping[str, tuple[LayerwiseModel, HiddenStates]], reference: Reference,
    means: Mapping[str, Sequence[str]] = {},
) -> dict[str, TokenLosses]:  # fmt: skip
    """Losses at every token of one distribution, from outputs of last blocks.

    Args:
        window: the distribution.
        models: name -> stages and outputs of the last block.
        reference: the original's outputs.
        means: name of an ensemble -> names of the models whose logits it averages.

    Returns:
        Losses of every model and ensemble.
    """
    own, answers = LayerwiseModel(reference.model), reference.hidden[window.name]
    found: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in (*models, *means)}
    for number, labels in enumerate(own.task.targets(window)):
        true = own.task.scored(own.head(answers.at(own.depth, number))).float().log_softmax(-1)
        logits = {
            name: stages.task.scored(stages.head(hidden.at(stages.depth, number))).float()
            for name, (stages, hidden) in models.items()
        }
        for name, members in means.items():
            logits[name] = torch.stack([logits[member] for member in members]).mean(0)
        for name, values in logits.items():
            mine = values.log_softmax(-1)
            found[name].append((
                (true.exp() * (true - mine)).sum(1), -mine.gather(1, labels[:, None])[:, 0],
                true.argmax(1) == mine.argmax(1),
            ))  # fmt: skip
    shape = (len(window.inputs), -1)
    return {
        name: TokenLosses(*(torch.cat(parts).reshape(shape) for parts in zip(*batches, strict=True)))
        for name, batches in found.items()
    }


def continuation(loss: Tensor) -> Tensor:
    """Mean loss of what follows a prompt, for every length of the prompt.

    >>> continuation(torch.tensor([1.0, 2.0, 3.0]))
    tensor([2.0000, 2.5000, 3.0000])

    Args:
        loss: [..., tokens] of each predicted token; the first is predicted from a prompt of one token.

    Returns:
        [..., tokens] for prompts of 1, 2, ... tokens.
    """
    counts = torch.arange(loss.shape[-1], 0, -1, dtype=loss.dtype)
    return loss.flip(-1).cumsum(-1).flip(-1) / counts
