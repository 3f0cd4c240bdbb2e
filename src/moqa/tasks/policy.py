"""Policies: what a robot sees and is told, and the actions that follow."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from moqa.data import Data, Demonstrations, ObservationSamples, Source, read_demonstrations, split_demonstrations
from moqa.data.demonstrations import chosen_of, content_hashes, read_episodes
from moqa.data.source import as_sources
from moqa.errors import MoqaError
from moqa.policies.adapter import Part, blocks_of, parts_of
from moqa.policies.members import ADAPTERS, adapter_of
from moqa.policies.observation import PolicyInputs
from moqa.tasks.configuration import read_configuration
from moqa.tasks.task import Samples, Task

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class PolicyReader:
    """Turns demonstrations into rows of numbers, for the policy in a folder.

    >>> PolicyReader("reference/policy").ids("open the drawer")
    tensor([11, 15,  6,  0,  0,  0])

    Args:
        folder: of the policy.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder, self._config = folder, read_configuration(Path(folder))
        self._adapter = adapter_of(self._config)
        self.fields = self._adapter.fields(self._config)

    def ids(self, instruction: str) -> Tensor:
        """[words] of an instruction."""
        return self._adapter.ids(self._config, instruction)

    def check(self, source: Demonstrations) -> None:
        """Refuse demonstrations of another robot.

        Raises:
            MoqaError: naming both.
        """
        own = self._adapter.robot(self._config)
        if own and source.robot != own:
            what = f"{source.name}={source.origin} holds demonstrations of {source.robot}"
            raise MoqaError(what, f"{self._folder} is a policy for {own}")

    def rows(self, source: Demonstrations, images: Tensor, state: Tensor, instruction: str) -> Tensor:
        """[observations, numbers] what the policy sees.

        Args:
            source: for messages.
            images: [observations, height, width, channels] uint8.
            state: [observations, state].
            instruction: that all of them have.

        Raises:
            MoqaError: if images or states have another shape than the policy takes.
        """
        pixels = images.movedim(-1, 1).float() / 255
        state = state if self.fields.state else state[:, :0]  # a policy without a state is given none
        for kind, found, wanted in (
            ("images", tuple(pixels.shape[1:]), self.fields.image), ("states", state.shape[1], self.fields.state)
        ):  # fmt: skip
            if found != wanted:
                what = f"{source.name}={source.origin}: {kind} are of size {found}"
                raise MoqaError(what, f"{self._folder} takes {wanted}")
        words = self.ids(instruction).expand(len(pixels), -1)
        return self.fields.row(PolicyInputs(pixels, state, words))

    def check_actions(self, source: Demonstrations, actions: Tensor) -> None:
        """Refuse actions of another size.

        Raises:
            MoqaError: naming both.
        """
        _, size = self._adapter.actions(self._config)
        if actions.shape[-1] != size:
            what = f"{source.name}={source.origin}: actions have {actions.shape[-1]} numbers"
            raise MoqaError(what, f"those of {self._folder} have {size}")


class Policy(Task):
    """See `Task`."""

    name, kind = "policy", "policy model"
    batch_size, batch_dims = 32, 1
    predicts_each, writes_samples, is_chain = False, False, False
    made_by = """moqa vla profile {typed}{data} --seed {seed} -o PROFILE
moqa vla plan PROFILE {budget}--by {strategy} -o PLAN
moqa vla quantize {typed} --plan PLAN --method {method} -o OUT"""
    used_by = """```python
from moqa.vla.actor import Actor

actor = Actor("FOLDER_OR_ID")
actions = actor.act(image, state, instruction)
```

`moqa vla rollout FOLDER_OR_ID -o OUT` lets it move the robot, `moqa verify FOLDER_OR_ID` checks every byte."""

    def accepts(self, config: "PretrainedConfig") -> bool:
        """See `Task`."""
        return any(adapter.accepts(config) for adapter in ADAPTERS)

    def auto_class(self, config: "PretrainedConfig") -> Any:
        """See `Task`."""
        return adapter_of(config).auto_class(config)

    def blocks(self, model: nn.Module) -> list[str]:
        """Blocks of vision encoder, projector, language model and action head."""
        return list(self.roles(model))

    def roles(self, model: nn.Module) -> Mapping[str, Part]:
        """The part that each block belongs to."""
        parts = parts_of(adapter_of(_config(model)), model)
        return {block: part for part, paths in parts.items() for path in paths for block in blocks_of(model, path)}

    def ends(self, model: "PreTrainedModel") -> list[Any]:  # noqa: ARG002
        """None: policies are in memory as a whole."""
        return []

    def depth(self, config: "PretrainedConfig") -> int:
        """See `Task`."""
        with torch.device("meta"):
            return len(self.blocks(self.auto_class(config).from_config(config)))

    def probe(self, model: nn.Module) -> Tensor:
        """One observation of nothing."""
        config = _config(model)
        return torch.zeros(1, adapter_of(config).fields(config).size)

    def call(self, model: nn.Module, batch: Tensor) -> Tensor:
        """[batch, numbers] observations -> [batch, chunk, action]."""
        adapter = adapter_of(_config(model))
        return adapter.act(model, adapter.fields(_config(model)).parted(batch))

    def scored(self, logits: Tensor) -> Tensor:
        """All actions."""
        return logits

    def targets(self, samples: Samples) -> Iterator[Tensor]:
        """What the expert did."""
        assert isinstance(samples, ObservationSamples)
        return iter(samples.actions.split(self.batch_size))

    def processor(self, folder: str | Path) -> PolicyReader:
        """See `PolicyReader`."""
        return PolicyReader(folder)

    def sources(self, data: Data, reader: Any) -> list[Source]:
        """Folders of demonstrations, see `moqa.data.read_demonstrations`."""
        found = as_sources(data, read_demonstrations)
        for source in found:
            reader.check(_demonstrations(source))
        return found

    def split(self, source: Source) -> tuple[Source, Source]:
        """See `moqa.data.split_demonstrations`."""
        return split_demonstrations(_demonstrations(source))

    def context(self, context: int) -> int:  # noqa: ARG002
        """Predictions of an observation: one chunk of actions."""
        return 1

    def cut(
        self, source: Source, reader: Any, context: int, count: int | None = None, seed: int = 0  # noqa: ARG002
    ) -> ObservationSamples:  # fmt: skip
        """Observations, evenly spaced in every task."""
        found = _demonstrations(source)
        reader.check(found)
        rows, actions, hashes = [], [], []
        for number, task in enumerate(found.files):
            episodes = read_episodes(found, task)
            reader.check_actions(found, episodes.actions)
            # the first tasks take what does not divide evenly
            share = None if count is None else (count + len(found.files) - 1 - number) // len(found.files)
            if share == 0:
                continue
            some = episodes.at(chosen_of(len(episodes.state) if share is None else share, len(episodes.state), seed))
            rows.append(reader.rows(found, some.images, some.state, some.instruction))
            actions.append(some.actions)
            hashes.append(content_hashes(some.images))
        return ObservationSamples(found.name, torch.cat(rows), torch.cat(actions), np.unique(np.concatenate(hashes)))


def _config(model: nn.Module) -> "PretrainedConfig":
    config: Any = model.config
    return config


def _demonstrations(source: Source) -> Demonstrations:
    if not isinstance(source, Demonstrations):
        raise MoqaError(f"{source.name}={source.origin} holds no demonstrations", "a policy reads folders of them")
    return source
