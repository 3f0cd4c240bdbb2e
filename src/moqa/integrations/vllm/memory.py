"""Fill the buffer of one of vLLM's layers with the parts of units that its process computes with."""

from collections.abc import Mapping

import torch
from torch import nn

from moqa.integrations.vllm.flat import FlatBuffer
from moqa.integrations.vllm.parts import UnitPart
from moqa.integrations.vllm.source import UnitSource
from moqa.kernels import PackedMatrix

# vLLM's LoRA layers look for this name to learn the device of a layer
WEIGHTS = "qweight"


class LayerMemory:
    """The packed matrices of a layer, in one parameter.

    Args:
        source: the checkpoint.
        parts: unit -> the part of it that this process has.
    """

    def __init__(self, source: UnitSource, parts: Mapping[str, UnitPart]) -> None:
        self._source, self._parts = source, parts
        self._buffer = FlatBuffer({
            f"{name}.{suffix}": entry
            for name, part in parts.items()
            for suffix, entry in part.scheme.tensors(part.shape).items()
        })  # fmt: skip

    def allocate(self, layer: nn.Module) -> None:
        """Give a layer the parameter, not filled yet."""
        memory = torch.empty(self._buffer.bytes, dtype=torch.uint8)
        layer.register_parameter(WEIGHTS, nn.Parameter(memory, requires_grad=False))

    def fill(self, layer: nn.Module) -> dict[str, PackedMatrix]:
        """Read the checkpoint; returns the matrix of each unit.

        Raises:
            MoqaError: if anything is missing.
        """
        memory = layer.get_parameter(WEIGHTS).data
        matrices = {}
        for name, part in self._parts.items():
            for suffix, tensor in part.cut(self._source.stored(name)).items():
                self._buffer.fill(memory, f"{name}.{suffix}", tensor)
        self._buffer.check_full()
        for name, part in self._parts.items():
            tensors = {s: self._buffer.view(memory, f"{name}.{s}") for s in part.scheme.tensors(part.shape)}
            matrices[name] = PackedMatrix(part.scheme, part.shape, tensors)
        return matrices
