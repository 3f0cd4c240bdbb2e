"""Large blocks of memory that one tensor after another uses."""

from threading import Lock
from weakref import ref

import numpy as np
import torch
from torch import Tensor


class ReusedMemory:
    """Memory for large tensors, reused once no tensor refers to it.

    >>> memory = ReusedMemory()
    >>> memory.take(torch.Size([64, 256, 256]), torch.bfloat16).shape
    torch.Size([64, 256, 256])

    The operating system clears the memory that it hands out, which adds half to the time of reading a file into it.
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._lock = Lock()  # a block may be read while another is read ahead

    def take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor with arbitrary values."""
        size = shape.numel() * dtype.itemsize
        with self._lock:
            block = next((block for block in self._blocks if block.size == size and block.is_free), None)
            if block is None:
                block = _Block(size)
                self._blocks.append(block)
            return torch.from_numpy(block.lend()).view(dtype).view(shape)

    def free(self) -> None:
        """Free the memory that no tensor refers to."""
        with self._lock:
            self._blocks = [block for block in self._blocks if not block.is_free]


class _Block:
    """Memory that one tensor after another uses."""

    def __init__(self, size: int) -> None:
        self.size = size
        # numpy asks the system for large pages, torch does not
        self._memory = np.empty(size, np.uint8)
        self._lent: ref[np.ndarray] | None = None

    @property
    def is_free(self) -> bool:
        """Whether no tensor or view refers to it: all of them hold the array that was lent."""
        return self._lent is None or self._lent() is None

    def lend(self) -> np.ndarray:
        """The memory as an array that only the tensor made from it will hold."""
        array = self._memory.view()
        self._lent = ref(array)
        return array
