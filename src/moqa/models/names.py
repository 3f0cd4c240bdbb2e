"""Where units lie in the original checkpoint, found through transformers' own conversion of names and layouts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moqa.errors import MoqaError
from moqa.models.experts import slice_expert
from moqa.models.parts import LinearPart
from moqa.models.stored import Stored
from moqa.models.units import Unit

if TYPE_CHECKING:
    from moqa.models.view import ModelView


@dataclass(frozen=True)
class DiskSlice:
    """A unit's matrix inside a tensor of the original checkpoint, which is plain or appears so (`Stored`).

    >>> place = view.disk_name(unit)
    >>> torch.equal(place.read(dict(tensors(folder))[place.tensor]), view.weight(unit))
    True

    Attributes:
        tensor: name on disk.
        shape: (out, in) of the matrix.
        offset: position of its first weight in the tensor.
        strides: steps in the tensor from one row to the next and from one column to the next; so an expert's share of
            a stack, half of a fused tensor, every second row and a transposed matrix are all one kind of slice.
    """

    tensor: str
    shape: tuple[int, int]
    offset: int
    strides: tuple[int, int]

    def read(self, tensor: Tensor) -> Tensor:
        """[out, in] view of the matrix in the tensor of that name."""
        whole = tensor.contiguous()
        return whole.as_strided(self.shape, self.strides, whole.storage_offset() + self.offset)


def find_disk_slices(view: "ModelView", layer: int) -> dict[str, DiskSlice]:
    """Places of one decoder layer's units in the original checkpoint, by name of the unit.

    >>> find_disk_slices(view, 3)["model.layers.3.mlp.experts.7.up_proj"].tensor
    'model.layers.3.mlp.experts.7.up_proj.weight'

    The layer's parameters are replaced by the numbers of their elements and sent through the conversion by which
    transformers saves the model; where the numbers come out, the weights lie. A unit that does not come out as one
    regular slice of one tensor is left out.

    Args:
        view: the model.
        layer: index of the decoder layer.

    Raises:
        MoqaError: if the folder that the view was opened from does not hold a tensor of that name and shape.
    """
    from transformers.core_model_loading import revert_weight_conversion

    numbered = _numbered(view, layer)
    units = {unit.name: (unit, _numbers(view, unit, numbered)) for unit in view.layer_units(layer)}
    stored = {k: v.contiguous() for k, v in revert_weight_conversion(view.model, dict(numbered)).items()}
    corners = {name: _corners(numbers) for name, (_, numbers) in units.items()}
    places = _places(stored, torch.tensor([number for corner in corners.values() for number in corner]))
    found: dict[str, DiskSlice] = {}
    for name, (unit, numbers) in units.items():
        (tensor, first), *others = (places.get(number, ("", 0)) for number in corners[name])
        if {tensor} == {other for other, _ in others} and tensor:
            below, right = (position - first for _, position in others)
            place = DiskSlice(tensor, unit.shape, first, (below, right))
            if _fits(place, stored[tensor]) and torch.equal(place.read(stored[tensor]), numbers):
                found[name] = place
    if view.folder is not None:
        _check_on_disk(view, {place.tensor: tuple(stored[place.tensor].shape) for place in found.values()})
    return found


def _numbered(view: "ModelView", layer: int) -> dict[str, Tensor]:
    """The layer's parameters with each weight replaced by its number in the layer."""
    module = view.layers[layer]
    prefix = next(path for path, found in view.model.named_modules() if found is module)
    parameters = {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}
    total = sum(parameter.numel() for parameter in parameters.values())
    numbers = torch.arange(total, dtype=torch.int32 if total < 2**31 else torch.int64)
    parts = torch.split(numbers, [parameter.numel() for parameter in parameters.values()])
    return {name: part.view(old.shape) for (name, old), part in zip(parameters.items(), parts, strict=True)}


def _numbers(view: "ModelView", unit: Unit, numbered: dict[str, Tensor]) -> Tensor:
    """[out, in] numbers of a unit's weights."""
    parameter, module = numbered[unit.parameter], view.module(unit.module)
    if unit.expert is not None:
        return slice_expert(module, parameter, unit.expert, unit.projection)
    return parameter[module.place] if isinstance(module, LinearPart) else parameter


def _corners(numbers: Tensor) -> list[int]:
    """Numbers of a matrix's first weight, of the one below it, and of the one to the right of it."""
    rows, columns = numbers.shape
    return [int(numbers[0, 0]), int(numbers[min(1, rows - 1), 0]), int(numbers[0, min(1, columns - 1)])]


def _places(stored: dict[str, Tensor], wanted: Tensor) -> dict[int, tuple[str, int]]:
    """Tensor and position of every wanted number."""
    total = 1 + max(int(numbers.max()) for numbers in stored.values())
    is_wanted = torch.zeros(total, dtype=torch.bool).index_fill_(0, wanted.long(), True)
    places = {}
    for name, numbers in stored.items():
        positions = is_wanted.index_select(0, numbers.flatten()).nonzero()[:, 0]
        for number, position in zip(numbers.flatten()[positions].tolist(), positions.tolist(), strict=True):
            places[number] = (name, position)
    return places


def _fits(place: DiskSlice, tensor: Tensor) -> bool:
    reach = place.offset + sum((side - 1) * stride for side, stride in zip(place.shape, place.strides, strict=True))
    return min(place.strides) >= 0 and reach < tensor.numel()


def _check_on_disk(view: "ModelView", expected: dict[str, tuple[int, ...]]) -> None:
    assert view.folder is not None
    found = {name: tuple(entry["shape"]) for name, entry in Stored(view.folder).headers.items()}
    for name, shape in expected.items():
        if found.get(name) != shape:
            holds = list(found[name]) if name in found else "no such tensor"
            raise MoqaError(f"{view.folder}: {name} should be {list(shape)}", f"the files hold {holds}")
