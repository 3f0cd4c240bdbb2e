"""The reference kernels: weights are unpacked and multiplied by torch, on any device. Slow, exact, and short."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from moqa.format.encodings import ENCODINGS
from moqa.kernels.fitting import TorchGrids
from moqa.kernels.matrix import PackedMatrix
from moqa.kernels.patch import patched_down
from moqa.kernels.registry import ExpertStack


def activate(name: str, gate: Tensor, up: Tensor) -> Tensor:
    """Combine the first two products of an expert.

    >>> activate("silu", torch.zeros(2), torch.ones(2))
    tensor([0., 0.])

    Args:
        name: one of `ACTIVATIONS`.
        gate: [..., width].
        up: [..., width].
    """
    if name == "silu":
        return silu(gate) * up
    if name == "swiglu_clamped":  # gpt_oss
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none") * up


class ReferenceKernels(TorchGrids):
    """`ProductKernels` and `GridKernels` in torch."""

    name = "reference"
    takes_patches = True

    @property
    def encodings(self) -> frozenset[str]:
        """Every encoding, as its own `decode` unpacks it."""
        return frozenset(ENCODINGS)

    def unusable(self, device: torch.device) -> str | None:  # noqa: ARG002
        """See `ProductKernels`."""
        return None

    def linear(self, matrix: PackedMatrix, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `ProductKernels`."""
        return linear(x, matrix.dense().to(x.dtype), None if bias is None else bias.to(x.dtype))

    def experts(self, stack: ExpertStack, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """See `ProductKernels`."""
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        biases = (stack.gate_bias, stack.up_bias, stack.down_bias)
        for expert in index.unique().tolist():
            if not 0 <= expert < len(stack.gate):
                continue
            tokens, places = (index == expert).nonzero(as_tuple=True)
            gate_bias, up_bias, down_bias = (None if bias is None else bias[expert] for bias in biases)
            rows = x[tokens]
            gate, up = self.linear(stack.gate[expert], rows), self.linear(stack.up[expert], rows)
            for patch in stack.patches:
                gate = patch.join(patch.gate, expert, rows, gate, self.linear)
                up = patch.join(patch.up, expert, rows, up, self.linear)
            gate, up = (p if b is None else p + b.to(p.dtype) for p, b in ((gate, gate_bias), (up, up_bias)))
            inner = activate(stack.activation, gate, up)
            out = patched_down(stack.patches, expert, inner, partial(self.linear, stack.down[expert]), self.linear)
            out = out if down_bias is None else out + down_bias.to(out.dtype)
            total.index_add_(0, tokens, out.float() * weights[tokens, places, None].float())
        return total.to(x.dtype)
