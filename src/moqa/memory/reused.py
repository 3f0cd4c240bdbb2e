"""Large blocks of memory that are lent to one tensor after another."""

from threading import Lock
from weakref import ref

import numpy as np
import torch
from torch import Tensor


class ReusedMemory:
    """Memory for large tensors, used again once no tensor lies in it.

    The system clears what it hands out, which takes half as long as reading into it.

    >>> memory = ReusedMemory()
    >>> weights = memory.take(torch.Size([64, 256, 256]), torch.bfloat16)
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._lock = Lock()  # a layer may be read while another one is read ahead

    def take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor with any values."""
        size = shape.numel() * dtype.itemsize
        with self._lock:
            block = next((block for block in self._blocks if block.size == size and block.is_free), None)
            if block is None:
                block = _Block(size)
                self._blocks.append(block)
            return torch.from_numpy(block.lend()).view(dtype).view(shape)

    def free(self) -> None:
        """Give back what nobody holds."""
        with self._lock:
            self._blocks = [block for block in self._blocks if not block.is_free]


class _Block:
    """Memory that is lent to one tensor after another."""

    def __init__(self, size: int) -> None:
        self.size = size
        # the system hands it out in large pages, if it does: numpy asks for them, torch does not
        self._memory = np.empty(size, np.uint8)
        self._lent: ref[np.ndarray] | None = None

    @property
    def is_free(self) -> bool:
        """Whether no tensor lies in it, nor a part of one: all of them hold the array that was lent."""
        return self._lent is None or self._lent() is None

    def lend(self) -> np.ndarray:
        """The memory, as an array that nothing but a tensor over it will hold."""
        array = self._memory.view()
        self._lent = ref(array)
        return array
