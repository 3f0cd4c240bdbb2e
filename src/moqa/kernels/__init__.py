"""Products with packed weights: the reference in torch, and kernels that give the same numbers faster."""

from moqa.kernels.fitting import Columns, Rounded
from moqa.kernels.matrix import PackedMatrix, Prepared
from moqa.kernels.native import NativeKernels
from moqa.kernels.patch import Channels, Patch
from moqa.kernels.reference import ReferenceKernels
from moqa.kernels.registry import ACTIVATIONS, KERNELS, ExpertStack, Kernels, find_kernels, register
from moqa.kernels.triton import TritonKernels

register(NativeKernels())
register(TritonKernels())
register(ReferenceKernels())

__all__ = [
    "ACTIVATIONS", "KERNELS", "Channels", "Columns", "ExpertStack", "Kernels", "PackedMatrix", "Patch", "Prepared",
    "Rounded", "find_kernels",
]  # fmt: skip
