"""The interface of tasks: the one place where text and images differ."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from moqa.data import Data, ImageSamples, ObservationSamples, Source, Windows

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


# samples of one distribution as a model reads them
Samples = Windows | ImageSamples | ObservationSamples


class Task(Protocol):
    """A task that models of transformers are made for.

    >>> task = view.task
    >>> task.name, task.batch_size
    ('causal_lm', 1024)

    Attributes:
        name: as profiles record it.
        kind: what a model of this task is called in messages.
        batch_size: predictions in one batch.
        batch_dims: number of leading dimensions that hidden states share with their batch.
        predicts_each: whether each position has its own prediction and label; else each sample has one.
        writes_samples: whether a model can write samples itself, for a plan's hedge.
        is_chain: whether each block reads what the one before it returns; else blocks are run by running the model.
        made_by: commands that make a checkpoint, for its card, which fills in what stands in braces.
        used_by: how a checkpoint is loaded and used, in Markdown, for its card.
    """

    name: str
    kind: str
    batch_size: int
    batch_dims: int
    predicts_each: bool
    writes_samples: bool
    is_chain: bool = True
    made_by: str = (
        "moqa quantize {typed} {budget}--strategy {strategy} --method {method} --ties {ties} --seed {seed}{data} -o OUT"
    )
    used_by: str

    def accepts(self, config: "PretrainedConfig") -> bool:
        """Whether transformers has a model of this task for a configuration."""

    def auto_class(self, config: "PretrainedConfig") -> Any:
        """The auto class of transformers that builds the model of a configuration."""

    def blocks(self, model: nn.Module) -> list[str]:
        """Paths of the blocks that hidden states go through, one after the other.

        Raises:
            MoqaError: if they cannot be found; names what was looked for.
        """

    def ends(self, model: "PreTrainedModel") -> list[Any]:
        """Modules outside the blocks that are read only when they are used; all others are read at once."""

    def roles(self, model: nn.Module) -> Mapping[str, str]:  # noqa: ARG002
        """Path of a block -> role of all its units, for blocks whose role does not depend on the unit."""
        return {}

    def depth(self, config: "PretrainedConfig") -> int:
        """Number of blocks of a model with this configuration."""

    def probe(self, model: nn.Module) -> Tensor:
        """The smallest batch."""

    def call(self, model: nn.Module, batch: Tensor) -> Tensor:
        """The model's logits for a batch."""

    def stand_in(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """A batch with the shape of the one that led to some hidden states; its values do not matter."""
        probe = self.probe(model)
        return probe.new_zeros(hidden.shape[: self.batch_dims] + probe.shape[self.batch_dims :])

    def predictions(self, logits: Tensor) -> Tensor:
        """[predictions, classes] all logits of a batch."""
        return logits.flatten(0, self.batch_dims - 1)

    def scored(self, logits: Tensor) -> Tensor:
        """[predictions, classes] those logits of a batch that have a label."""

    def targets(self, samples: Samples) -> Iterator[Tensor]:
        """[predictions] labels of what `scored` returns, batch by batch."""

    def processor(self, folder: str | Path) -> Any:
        """The tokenizer or image processor of a model folder.

        Raises:
            MoqaError: if the folder has none.
        """

    def reader(self, folder: str | Path) -> Any:
        """The reader that `sources` and `cut` need for the model in a folder.

        Raises:
            MoqaError: if the folder lacks what is needed.
        """
        return self.processor(folder)

    def sources(self, data: Data, reader: Any) -> list[Source]:
        """Distributions from NAME=SOURCE specs or name -> source; ready ones are returned as they are.

        Raises:
            MoqaError: if one cannot be read, or is for another task.
        """

    def split(self, source: Source) -> tuple[Source, Source]:
        """A calibration split and a held-out split.

        Raises:
            MoqaError: if there is too little for both.
        """

    def context(self, context: int) -> int:
        """Predictions of a sample, for the context that a user asked for."""

    def cut(self, source: Source, reader: Any, context: int, count: int | None = None, seed: int = 0) -> Samples:
        """Samples of a distribution, evenly spaced.

        Raises:
            MoqaError: if there are none, or one cannot be read.
        """

    def batches(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Inputs in batches of about `batch_size` predictions."""
        return inputs.split(max(1, self.batch_size // inputs.shape[1 : self.batch_dims].numel()))

    def count(self, inputs: Tensor) -> int:
        """Number of predictions for some inputs."""
        return inputs.shape[: self.batch_dims].numel()


def used_through(auto_class: str, command: str) -> str:
    """What a card says about using a checkpoint that transformers can load itself.

    >>> used_through("AutoModel", "`moqa serve FOLDER_OR_ID` answers").splitlines()[-1]
    '`moqa serve FOLDER_OR_ID` answers, `moqa verify FOLDER_OR_ID` checks every byte.'

    Args:
        auto_class: of transformers.
        command: what moqa can do with it, a half-sentence.
    """
    return f"""```python
import moqa

model, processor = moqa.load("FOLDER_OR_ID")
```

or by transformers alone:

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("FOLDER_OR_ID")
```

{command}, `moqa verify FOLDER_OR_ID` checks every byte."""


def paths_in(model: nn.Module, blocks: nn.ModuleList) -> list[str]:
    """Paths in a model of the modules of a list.

    >>> paths_in(view.model, view.model.model.layers)[:2]
    ['model.layers.0', 'model.layers.1']
    """
    root = next(path for path, module in model.named_modules() if module is blocks)
    return [f"{root}.{index}" for index in range(len(blocks))]
