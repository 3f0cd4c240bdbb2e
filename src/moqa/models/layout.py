"""Inputs and outputs of linear layers and convolutions as the rows of one matrix product."""

from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.nn.functional import unfold

_IMAGE_DIMS = 4  # batch, channels, height, width


@dataclass(frozen=True)
class Convolution:
    """A convolution as a product of its [out, in * height * width] matrix with patches of its input.

    Of sequences it is one of images of height 1.

    >>> convolution = Convolution.of(nn.Conv2d(3, 16, 3, padding=1))
    >>> convolution.patches(torch.ones(2, 3, 8, 8)).shape
    torch.Size([128, 27])

    Attributes:
        kernel: height and width.
        stride: vertical and horizontal.
        padding: vertical and horizontal, with zeros.
        dilation: vertical and horizontal.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, module: nn.Conv1d | nn.Conv2d) -> "Convolution":
        """Of a module for which `is_convolution` is true."""
        sizes: tuple[Any, ...] = (module.kernel_size, module.stride, module.padding, module.dilation)
        if isinstance(module, nn.Conv1d):
            sizes = tuple((height, size[0]) for height, size in zip((1, 1, 0, 1), sizes, strict=True))
        return cls(*((int(size[0]), int(size[1])) for size in sizes))

    def patches(self, x: Tensor) -> Tensor:
        """[batch, channels, (height,) width] -> [batch * positions, channels * kernel height * kernel width]."""
        columns = unfold(_image(x), self.kernel, self.dilation, self.padding, self.stride)
        return columns.mT.reshape(-1, columns.shape[1])

    def outputs(self, rows: Tensor, x: Tensor) -> Tensor:
        """[batch * positions, out] products for an input -> [batch, out, (height,) width]."""
        height, width = (
            (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for side, kernel, stride, padding, dilation in zip(
                _image(x).shape[-2:], self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        found = rows.view(len(x), height, width, rows.shape[1]).permute(0, 3, 1, 2).contiguous()
        return found if x.dim() == _IMAGE_DIMS else found.squeeze(2)


def _image(x: Tensor) -> Tensor:
    """[batch, channels, (height,) width] with a height."""
    return x if x.dim() == _IMAGE_DIMS else x.unsqueeze(2)


def is_convolution(module: nn.Module) -> TypeGuard[nn.Conv1d | nn.Conv2d]:
    """Whether a module is a convolution that is one matrix product: without groups, padded with zeros."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return False
    plain = type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward)
    return plain and module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def layout_of(module: nn.Module) -> Convolution | None:
    """The convolution that a module computes; None for a linear layer."""
    return Convolution.of(module) if isinstance(module, nn.Conv1d | nn.Conv2d) else None


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """[rows, in] from the input of a module that holds a unit."""
    convolution = layout_of(module)
    return x.flatten(0, -2) if convolution is None else convolution.patches(x)


def output_rows(module: nn.Module, out: Tensor) -> Tensor:
    """[rows, out] from its output, or from the gradient of its output."""
    return out.flatten(0, -2) if layout_of(module) is None else out.movedim(1, -1).flatten(0, -2)
