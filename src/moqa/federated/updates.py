"""Updates and models as bytes on the wire: large tensors packed in moqa's format, small ones as they are."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from moqa.errors import MoqaError
from moqa.federated.modes import FULL
from moqa.format.encodings import TensorSpec
from moqa.format.planes import pack
from moqa.format.scheme import Scheme
from moqa.format.tiles import TILE
from moqa.methods.grid import fit_grid

State = dict[str, Tensor]
# weights that share a scale are a row of the matrix that a tensor is packed as, so that only its last tile has padding
_GROUP = 64
_LEAST = TILE * _GROUP


class UpdateError(MoqaError):
    """An update that is not what was asked for."""


@dataclass(frozen=True)
class Packing:
    """How tensors of a model travel.

    >>> packing = Packing({"w": torch.zeros(64, 32), "b": torch.zeros(64)}, bits=2)
    >>> sorted(packing.tensors)
    ['b', 'w.p0', 'w.scale']
    >>> packing.unpack(packing.pack({"w": torch.ones(64, 32), "b": torch.ones(64)}))["w"].shape
    torch.Size([64, 32])

    Attributes:
        like: tensors with the names, shapes and dtypes of what travels, such as a state dict.
        bits: of matrices with at least 1024 numbers, symmetric and with one scale of 16 bits per 64 numbers; 32 sends
            them as they are.
    """

    like: Mapping[str, Tensor]
    bits: int

    @cached_property
    def scheme(self) -> Scheme:
        """Of packed tensors."""
        return Scheme(width=self.bits, group_size=_GROUP, symmetric=True)

    def is_packed(self, name: str) -> bool:
        """Whether a tensor is sent in few bits."""
        tensor = self.like[name]
        return self.bits != FULL and tensor.is_floating_point() and tensor.dim() > 1 and tensor.numel() >= _LEAST

    @cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        """Dtype and shape of everything that a message holds, by name."""
        found = dict[str, TensorSpec]()
        for name, tensor in self.like.items():
            if self.is_packed(name):
                specs = self.scheme.tensors(self._matrix(name))
                found |= {f"{name}.{suffix}": spec for suffix, spec in specs.items()}
            else:
                found[name] = (tensor.dtype, tuple(tensor.shape))
        return found

    @cached_property
    def length(self) -> int:
        """Bytes of every message."""
        return len(save({name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in self.tensors.items()}))

    def pack(self, values: Mapping[str, Tensor]) -> bytes:
        """Tensors as bytes: safetensors whose names have the suffixes of `Scheme.tensors`."""
        stored = dict[str, Tensor]()
        for name, like in self.like.items():
            value = values[name]
            if self.is_packed(name):
                rows, columns = self._matrix(name)
                flat = torch.zeros(rows * columns)
                flat[: value.numel()] = value.detach().float().flatten()
                found = fit_grid(flat.view(rows, columns), self.scheme)
                parts = found.grid.stored(pack(found.integers, self.bits))
                stored |= {f"{name}.{suffix}": part.contiguous() for suffix, part in parts.items()}
            else:
                stored[name] = value.detach().to(like.dtype).contiguous()
        return save(stored)

    def unpack(self, data: bytes) -> State:
        """Tensors of bytes that another party sent.

        Raises:
            UpdateError: if they are not exactly what `pack` makes: another length, another tensor, a number that is
                not finite.
        """
        if len(data) != self.length:
            raise UpdateError(f"{len(data):,} bytes instead of {self.length:,}")
        try:
            stored = load(data)
        except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise UpdateError(f"not safetensors ({str(error).splitlines()[0]})") from None
        other = stored.keys() ^ self.tensors.keys()
        if other:
            raise UpdateError(f"unexpected or missing tensor {min(other)}")
        for name, (dtype, shape) in self.tensors.items():
            tensor = stored[name]
            if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
                raise UpdateError(
                    f"{name} has {_described(tensor.dtype, tensor.shape)}, not {_described(dtype, shape)}"
                )
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UpdateError(f"{name} has numbers that are not finite")
        return {name: self._value(name, stored) for name in self.like}

    def _value(self, name: str, stored: Mapping[str, Tensor]) -> Tensor:
        like = self.like[name]
        if not self.is_packed(name):
            return stored[name]
        shape = self._matrix(name)
        parts = self.scheme.among(stored, name, shape)
        if (parts["scale"] < 0).any():
            raise UpdateError(f"{name} has negative scales")
        matrix = self.scheme.storage.decode(self.scheme, shape, parts)
        return matrix.flatten()[: like.numel()].reshape(like.shape).to(like.dtype)

    def _matrix(self, name: str) -> tuple[int, int]:
        return math.ceil(self.like[name].numel() / _GROUP), _GROUP


def packed_update(
    packing: Packing, before: Mapping[str, Tensor], after: Mapping[str, Tensor], residual: Mapping[str, Tensor]
) -> tuple[bytes, State]:
    """A client's update as bytes, and what rounding has left of it for the next one (error feedback, arXiv 1901.09847).

    >>> packing = Packing({"w": torch.zeros(64, 32)}, bits=2)
    >>> data, left = packed_update(packing, {"w": torch.zeros(64, 32)}, {"w": torch.ones(64, 32)}, {})
    >>> torch.equal(packing.unpack(data)["w"] + left["w"], torch.ones(64, 32))
    True

    Args:
        packing: how the update travels.
        before: tensors that the client received.
        after: those that it has trained.
        residual: what is left of earlier updates, by name.

    Raises:
        MoqaError: if training left a number that is not finite.
    """
    values = differences(before, after, residual)
    data = packing.pack(values)
    sent = packing.unpack(data)
    left = {name: value - sent[name] for name, value in values.items() if packing.is_packed(name)}
    return data, left


def differences(before: Mapping[str, Tensor], after: Mapping[str, Tensor], residual: Mapping[str, Tensor]) -> State:
    """What training has changed, and what was left of earlier updates; see `packed_update`.

    >>> differences({"b": torch.zeros(1)}, {"b": torch.ones(1)}, {"b": torch.ones(1)})
    {'b': tensor([2.])}
    """
    values = State()
    for name, new in after.items():
        values[name] = new.detach() - before[name]
        if new.is_floating_point():
            values[name] = values[name] + residual.get(name, 0.0)
        if not values[name].isfinite().all():
            raise MoqaError(f"training left {name} with numbers that are not finite", "lower the learning rate")
    return values


def _described(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
