"""Stacks: units of one block that a method can solve together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moqa.calibration.inputs import InputStatistics, input_space
from moqa.format.scheme import Scheme
from moqa.models.units import Unit
from moqa.models.view import ModelView

# weights of one stack; larger stacks gain no speed and cost memory
STACK_WEIGHTS = 2**22


@dataclass(frozen=True)
class UnitStack:
    """Input spaces whose units have equal shapes.

    Attributes:
        entries: the units of each input space.
        weights: [entries, rows, in] the units' matrices, concatenated by rows, float32.
        inputs: statistics of each input space.
        scheme: the units' scheme; its width does not matter.
    """

    entries: list[list[Unit]]
    weights: Tensor
    inputs: list[InputStatistics]
    scheme: Scheme

    @property
    def parts(self) -> tuple[int, ...]:
        """Rows of each unit of an input space."""
        return tuple(unit.shape[0] for unit in self.entries[0])

    def places(self) -> Iterator[tuple[Unit, int, slice]]:
        """Every unit with its entry and its rows."""
        for entry, units in enumerate(self.entries):
            start = 0
            for unit in units:
                yield unit, entry, slice(start, start + unit.shape[0])
                start += unit.shape[0]


def stacks(
    view: ModelView,
    units: Sequence[Unit],
    schemes: Mapping[str, Scheme],
    inputs: Mapping[str, InputStatistics],
    copies: int = 1,
) -> Iterator[UnitStack]:
    """Group units by input space, and input spaces by shape and scheme.

    Args:
        view: the model; its weights are read.
        units: of one block.
        schemes: unit name -> scheme; widths may differ within a stack.
        inputs: input space -> its statistics; missing ones are zeros.
        copies: how often the caller will repeat the rows; stacks get smaller by this factor.
    """
    spaces: dict[tuple, list[Unit]] = {}
    for unit in units:
        spaces.setdefault((input_space(unit), schemes[unit.name].model_copy(update={"width": 8})), []).append(unit)
    alike: dict[tuple, list[list[Unit]]] = {}
    for (_, scheme), sharing in spaces.items():
        alike.setdefault((scheme, tuple(unit.shape for unit in sharing)), []).append(sharing)
    for (scheme, shapes), entries in alike.items():
        size = max(1, STACK_WEIGHTS // (copies * sum(out * features for out, features in shapes)))
        for start in range(0, len(entries), size):
            part = entries[start : start + size]
            rows, features = sum(out for out, _ in shapes), shapes[0][1]
            seen = [inputs.get(input_space(sharing[0])) or InputStatistics(features) for sharing in part]
            stack = UnitStack(part, torch.empty(len(part), rows, features, dtype=torch.float32), seen, scheme)
            for unit, entry, place in stack.places():
                stack.weights[entry, place] = view.weight(unit)
            yield stack
