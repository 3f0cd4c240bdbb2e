"""One packed unit in the form that all kernels take."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self
from weakref import ref

import torch
from torch import Tensor, nn

from moqa.format.scheme import Scheme
from moqa.format.tiles import PLANES


class PackedMatrix(nn.Module):
    """One unit as it is stored.

    >>> PackedMatrix(Scheme(width=16), (2, 32), {"weight": torch.zeros(2, 32, dtype=torch.bfloat16)}).dense().shape
    torch.Size([2, 32])

    Args:
        scheme: how it is stored.
        shape: (out, in).
        tensors: by suffix, see `Scheme.tensors`.

    Raises:
        ValueError: if a tensor is not contiguous, or its dtype or shape is not the scheme's.
    """

    def __init__(self, scheme: Scheme, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.scheme, self.shape = scheme, shape
        for suffix, entry in scheme.tensors(shape).items():
            tensor = tensors[suffix]
            if (tensor.dtype, tuple(tensor.shape)) != entry or not tensor.is_contiguous():
                raise ValueError(f"{suffix} is {tensor.dtype} {tuple(tensor.shape)}, not {entry}")
            self.register_buffer(suffix, tensor)
        # what kernels derived from this matrix, and the weights while they are held unpacked
        self.prepared: Any = None
        self._held: Tensor | None = None
        self._uses: tuple[ref[Prepared], ...] = ()

    @property
    def planes(self) -> list[Tensor]:
        """Planes of the integers, the most significant first."""
        return [self.get_buffer(f"p{index}") for index in range(len(PLANES.get(self.scheme.width, ())))]

    def dense(self) -> Tensor:
        """[out, in] weights, float32."""
        held = self._held  # another thread may release it
        if held is not None:
            return held
        return self.scheme.storage.decode(self.scheme, self.shape, dict(self.named_buffers()))

    def hold(self, weights: Tensor | None = None) -> None:
        """Unpack once: until `release`, `dense` returns these weights, or those given in their place."""
        self._held = self.dense() if weights is None else weights

    def release(self) -> None:
        """Free the unpacked weights."""
        self._held = None

    @property
    def is_trained(self) -> bool:
        """Whether it is held as weights that get gradients."""
        return self._held is not None and self._held.requires_grad

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # casting a model to another dtype leaves the stored scales alone; only their device may change
        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        before = self._places()
        super()._apply(moved, recurse)
        if self._places() != before:
            self._forget()
        return self

    def used_in(self, prepared: "Prepared") -> None:
        """Register something that holds this matrix's addresses, to be marked as ended once they are invalid."""
        self._uses = (*(use for use in self._uses if use() is not None), ref(prepared))

    # kernels remember addresses, which are valid as long as the tensors they belong to

    def _places(self) -> list[tuple[torch.device, int]]:
        return [(tensor.device, tensor.data_ptr()) for tensor in self.buffers()]

    def _forget(self) -> None:
        self.prepared = None
        for use in self._uses:
            prepared = use()
            if prepared is not None:
                prepared.ended = True
        self._uses = ()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, Tensor) and name != "_held":
            self._forget()

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"prepared": None, "_held": None, "_uses": ()}


class Prepared:
    """Something that holds the addresses of matrices, and whether one of these has moved since (`ended`).

    >>> prepared = Prepared([matrix.planes[0].data_ptr()], [matrix])
    >>> prepared.ended
    False

    Args:
        made: what holds the addresses.
        matrices: all matrices whose addresses it holds.
    """

    def __init__(self, made: Any, matrices: Iterable[PackedMatrix]) -> None:
        self.made, self.ended = made, False
        for matrix in matrices:
            matrix.used_in(self)
