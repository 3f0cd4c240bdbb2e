"""Products with packed weights: the reference in torch, and kernels that give the same numbers faster."""

from moqa.kernels.matrix import PackedMatrix
from moqa.kernels.native import NativeKernels
from moqa.kernels.reference import ReferenceKernels
from moqa.kernels.registry import ACTIVATIONS, KERNELS, ExpertStack, Kernels, find_kernels, register
from moqa.kernels.triton import TritonKernels

register(NativeKernels())
register(TritonKernels())
register(ReferenceKernels())

__all__ = ["ACTIVATIONS", "KERNELS", "ExpertStack", "Kernels", "PackedMatrix", "find_kernels"]
