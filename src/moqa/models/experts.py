"""Routed experts of transformers 5: one way to read, write and run their stacked 3-D parameters."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moqa.errors import MoqaError
from moqa.models.attributes import having
from moqa.models.products import product

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
IMPLEMENTATION = "moqa"

# a module for which `is_experts` is true; typed as nn.Module, its attributes would all be tensors or modules
Experts = Any


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a stack of routed experts behind transformers' experts interface."""
    return hasattr(module, "is_transposed") and hasattr(module, "gate_up_proj") and hasattr(module, "down_proj")


def check_supported(path: str, module: Experts) -> None:
    """Refuse expert stacks whose forward is not gate, up, activation, down.

    Raises:
        MoqaError: naming the module and what it has or lacks.
    """
    kind = f"{path} ({type(module).__name__})"
    if not module.has_gate or getattr(module, "has_post_expert_norm", False):
        raise MoqaError(f"{kind} has experts without a gate or with a norm inside")
    known = {f"{name}{suffix}" for name in ("gate_up_proj", "down_proj") for suffix in ("", "_bias")}
    other = [name for name, _ in module.named_parameters() if name not in known]
    if other:
        raise MoqaError(f"{kind} has experts with {other[0]}", f"known are {', '.join(sorted(known))}")
    if len(module.gate_up_proj) != module.num_experts or len(module.down_proj) != module.num_experts:
        raise MoqaError(f"{kind} holds {len(module.gate_up_proj)} experts", f"its num_experts is {module.num_experts}")


def parameter_of(projection: str) -> str:
    """Name of the stacked parameter that holds a projection."""
    return "down_proj" if projection == "down_proj" else "gate_up_proj"


def expert_matrix(module: Experts, expert: int, projection: str) -> Tensor:
    """View of one expert's matrix as [out, in], whatever the family's layout is.

    >>> expert_matrix(view.experts(0), 7, "down_proj").shape
    torch.Size([256, 256])

    Args:
        module: a stack of experts (`is_experts`).
        expert: index of the expert.
        projection: `gate_proj`, `up_proj` or `down_proj`.

    Returns:
        A view of the parameter: writing to it changes the model.
    """
    stored = getattr(module, parameter_of(projection)).detach()[expert]
    matrix = stored.T if module.is_transposed else stored
    return matrix if projection == "down_proj" else matrix[projection_rows(module)[projection]]


def projection_rows(module: Experts, width: int | None = None) -> dict[str, slice]:
    """Positions of gate and up rows in the product with `gate_up_proj`, or in a product of 2 x `width` features."""
    if not module.is_concatenated:
        return {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
    if width is None:
        width = module.gate_up_proj.shape[2 if module.is_transposed else 1] // 2
    return {"gate_proj": slice(0, width), "up_proj": slice(width, None)}


@dataclass(frozen=True)
class ExpertRun:
    """One expert's work on the tokens that were routed to it.

    Attributes:
        expert: its index.
        x: [tokens, features] inputs.
        gate_up: [tokens, 2 * width] product with the gate and up rows, in the family's own order.
        inner: [tokens, width] activation between the products.
        out: [tokens, features] product with `down_proj`, not yet weighted.
        gate: [tokens, 1] gate weights.
    """

    expert: int
    x: Tensor
    gate_up: Tensor
    inner: Tensor
    out: Tensor
    gate: Tensor

    def on_gradients(self, rows: Mapping[str, slice], add: Callable[[str, Tensor, Tensor], None]) -> None:
        """Call `add` with projection, its input, and the gradient of its output, once there are gradients.

        Args:
            rows: see `projection_rows`.
            add: called for each projection.
        """
        x, inner = self.x.detach(), self.inner.detach()

        def back_gate_up(gradient: Tensor) -> None:
            for projection, at in rows.items():
                add(projection, x, gradient[:, at])

        self.gate_up.register_hook(back_gate_up)
        self.out.register_hook(lambda gradient: add("down_proj", inner, gradient))


class ExpertsObserver(Protocol):
    """Watches the experts of a block while they run, for a profile or a quantizer."""

    def routed(self, index: Tensor, weights: Tensor) -> None:
        """Called once per forward with [tokens, top_k] expert indices (int64) and gate weights."""

    def expert(self, run: ExpertRun) -> None:
        """Called for each expert that got tokens."""


def observed(module: nn.Module, observer: ExpertsObserver) -> AbstractContextManager[None]:
    """A `with` block in which an observer watches a stack of experts."""
    return having(module, "moqa_observer", observer)


def weights_from(module: Experts, source: "ExpertWeights | None") -> AbstractContextManager[None]:
    """A `with` block in which a stack of experts multiplies with other weights; None changes nothing."""
    return nullcontext() if source is None else having(module, "moqa_weights", source)


def with_bias(module: Experts, parameter: str, expert: int, product: Tensor) -> Tensor:
    """One expert's product with its bias, in families that have one."""
    return product + getattr(module, f"{parameter}_bias")[expert] if module.has_bias else product


class ExpertWeights(Protocol):
    """What the experts of a block multiply with: the model's parameters or packed planes."""

    def run(self, module: Experts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor | None:
        """What `run_experts` returns, in one call; None if it must be computed from `gate_up` and `down`."""

    def gate_up(self, expert: int, x: Tensor) -> Tensor:
        """[tokens, 2 * width] product with the gate and up rows, in the family's own order."""

    def down(self, expert: int, x: Tensor) -> Tensor:
        """[tokens, hidden] product."""


class ParameterWeights:
    """Matrices straight from the stacked parameters."""

    def __init__(self, module: Experts) -> None:
        # unbind once: indexing an expert out of a 3-D parameter costs a full zero fill in its gradient
        self._gate_up = module.gate_up_proj.unbind(0)
        self._down = module.down_proj.unbind(0)
        self._transposed = bool(module.is_transposed)
        self._dtype: torch.dtype | None = getattr(module, "moqa_dtype", None)

    def run(self, module: Experts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor | None:  # noqa: ARG002
        """See `ExpertWeights`."""
        return None

    def gate_up(self, expert: int, x: Tensor) -> Tensor:
        """See `ExpertWeights`."""
        return product(x, self._gate_up[expert] if self._transposed else self._gate_up[expert].T, self._dtype)

    def down(self, expert: int, x: Tensor) -> Tensor:
        """See `ExpertWeights`."""
        return product(x, self._down[expert] if self._transposed else self._down[expert].T, self._dtype)


def run_experts(module: Experts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """All routed experts of a block on a batch of tokens: sort tokens by expert, one product per expert.

    >>> hidden, index, gates = torch.ones(5, 256), torch.tensor([[0, 3]] * 5), torch.full((5, 2), 0.5)
    >>> run_experts(view.experts(0), hidden, index, gates).shape
    torch.Size([5, 256])

    Args:
        module: a stack of experts; its `moqa_observer` watches, its `moqa_weights` replaces what it multiplies with,
            or its `moqa_weights_of` makes that for each call.
        hidden: [tokens, features] inputs.
        index: [tokens, top_k] expert of each token, int64; an index past the last expert means none.
        weights: [tokens, top_k] gate weights.

    Returns:
        [tokens, features] gate-weighted sum over the experts of each token.
    """
    observer: ExpertsObserver | None = getattr(module, "moqa_observer", None)
    made: Callable[[Experts], ExpertWeights] = getattr(module, "moqa_weights_of", ParameterWeights)
    source: ExpertWeights = getattr(module, "moqa_weights", None) or made(module)
    if observer is None:
        whole = source.run(module, hidden, index, weights)
        if whole is not None:
            return whole
    else:
        observer.routed(index, weights)
    tokens, top_k = index.shape
    order = index.reshape(-1).argsort(stable=True)
    counts = torch.bincount(index.reshape(-1), minlength=module.num_experts).tolist()
    outputs = []
    for expert, slots in enumerate(torch.split(order, counts)):
        if expert >= module.num_experts:
            outputs.append(hidden.new_zeros(len(slots), hidden.shape[1]))
        elif len(slots):
            x = hidden[slots // top_k]
            gate_up = with_bias(module, "gate_up_proj", expert, source.gate_up(expert, x))
            inner = module._apply_gate(gate_up)
            out = with_bias(module, "down_proj", expert, source.down(expert, inner))
            if observer is not None:
                gate = weights.reshape(-1)[slots, None]
                observer.expert(ExpertRun(expert, x, gate_up, inner, out, gate))
            outputs.append(out)
    # back to the order of the tokens, by a gather and a sum, which are deterministic
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    sums = torch.cat(outputs)[places].reshape(tokens, top_k, hidden.shape[1]) * weights[..., None]
    return sums.sum(1).to(hidden.dtype)


def register_experts() -> None:
    """Let models of transformers run their experts by `run_experts`, as the implementation `moqa`."""
    # late: rounding a plain torch module, as every message to a federated client does anew, needs no transformers
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    run: Callable = run_experts
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, run)
