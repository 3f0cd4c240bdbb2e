"""Products with packed weights, and grids for weights: a reference in torch, and kernels that are faster."""

from moqa.kernels.fitting import Columns, Rounded
from moqa.kernels.matrix import PackedMatrix, Prepared
from moqa.kernels.native import NativeKernels
from moqa.kernels.patch import Channels, Patch
from moqa.kernels.reference import ReferenceKernels
from moqa.kernels.registry import (
    ACTIVATIONS,
    GRID_KERNELS,
    KERNELS,
    ExpertStack,
    GridKernels,
    ProductKernels,
    check_encoding,
    find_grid_kernels,
    find_kernels,
)
from moqa.kernels.triton import TritonKernels

KERNELS.update(native=NativeKernels(), triton=TritonKernels(), reference=ReferenceKernels())
GRID_KERNELS.update(native=NativeKernels(), reference=ReferenceKernels())

__all__ = [
    "ACTIVATIONS", "GRID_KERNELS", "KERNELS", "Channels", "Columns", "ExpertStack", "GridKernels", "PackedMatrix",
    "Patch", "Prepared", "ProductKernels", "Rounded", "check_encoding", "find_grid_kernels", "find_kernels",
]  # fmt: skip
