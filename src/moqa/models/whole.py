"""Run a model whose blocks are no chain: a block is run by running the whole model."""

from typing import TYPE_CHECKING

from torch import Tensor

from moqa.models.layerwise import LayerwiseModel
from moqa.tasks import task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WholeModel(LayerwiseModel):
    """What `LayerwiseModel` does, where what passes from block to block is the batch itself.

    Every block sees what it sees in the original: its inputs do not depend on what was done to earlier blocks.

    >>> stages = stages_of(view.model)
    >>> isinstance(stages, WholeModel)
    False
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model, self.task = model, task_of(model.config)
        self.blocks = [model.get_submodule(path) for path in self.task.blocks(model)]
        self.depth = len(self.blocks)

    def embed(self, inputs: Tensor) -> Tensor:
        """The batch."""
        return inputs

    def run_block(self, index: int, hidden: Tensor) -> Tensor:  # noqa: ARG002
        """Run the model on a batch, so that those who watch the block see its inputs; returns the batch."""
        self.task.call(self.model, hidden)
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """What the model predicts for a batch."""
        return self.task.call(self.model, hidden)


def stages_of(model: "PreTrainedModel") -> LayerwiseModel:
    """The stages of a model, as its task allows.

    >>> type(stages_of(view.model)).__name__
    'LayerwiseModel'
    """
    return LayerwiseModel(model) if task_of(model.config).is_chain else WholeModel(model)
