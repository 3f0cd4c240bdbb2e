"""One buffer of bytes for all tensors of a layer, and what was filled in so far: vLLM does not check that."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from moqa.errors import MoqaError
from moqa.format.layout import ALIGNMENT, Entry, entry_bytes


@dataclass
class FlatBuffer:
    """Where each of a layer's tensors is in one buffer, which ones were filled, and with how many bytes.

    >>> buffer = FlatBuffer({"q_proj.p0": (torch.uint8, (1, 2, 64)), "q_proj.scale": (torch.bfloat16, (1, 1, 16))})
    >>> buffer.bytes, buffer.missing()
    (192, ['q_proj.p0', 'q_proj.scale'])

    Attributes:
        entries: dtype and shape of every tensor by name.
        offsets: of every tensor in bytes: multiples of 64, as kernels need it.
    """

    entries: Mapping[str, Entry]
    offsets: dict[str, int] = field(init=False)
    _filled: dict[str, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.offsets, self._end = {}, 0
        for name, entry in self.entries.items():
            self.offsets[name] = self._end
            self._end += -(-entry_bytes(entry) // ALIGNMENT) * ALIGNMENT

    @property
    def bytes(self) -> int:
        """Length of the buffer."""
        return self._end

    def view(self, memory: Tensor, name: str) -> Tensor:
        """A tensor, in the [bytes] uint8 memory of the buffer."""
        begin, entry = self.offsets[name], self.entries[name]
        return memory[begin : begin + entry_bytes(entry)].view(entry[0]).view(entry[1])

    def fill(self, memory: Tensor, name: str, tensor: Tensor) -> None:
        """Copy a tensor to its place, and count its bytes.

        Args:
            memory: [bytes] uint8 of the buffer.
            name: of the tensor.
            tensor: of the dtype and shape of its entry.

        Raises:
            MoqaError: if there is no such place, it is filled already, or the tensor is another.
        """
        entry = self.entries.get(name)
        if entry is None or name in self._filled:
            raise MoqaError(f"{name} was given to a layer", "it has no place for it" if entry is None else "twice")
        if (tensor.dtype, tuple(tensor.shape)) != entry:
            raise MoqaError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}", f"its place is for {entry}")
        self.view(memory, name).copy_(tensor)
        self._filled[name] = tensor.nbytes

    def missing(self) -> list[str]:
        """Names of the tensors that were not filled."""
        return [name for name in self.entries if name not in self._filled]

    def check_full(self) -> None:
        """Refuse to compute with memory that nothing was written to.

        Raises:
            MoqaError: if tensors are missing; naming one, and the bytes that were filled.
        """
        if missing := self.missing():
            wanted = sum(map(entry_bytes, self.entries.values()))
            raise MoqaError(
                f"the checkpoint lacks {missing[0]}", f"{sum(self._filled.values())} of {wanted} bytes were filled"
            )
