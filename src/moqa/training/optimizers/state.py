"""What optimizers know, as tensors for a file and numbers for a note."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def taken_apart(optimizers: Sequence[Optimizer]) -> tuple[dict[str, Tensor], Any]:
    """Tensors by name, and everything else as JSON that says where each of them belongs.

    >>> tensors, rest = taken_apart([torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)])
    >>> rest["list"][0]["pairs"][1][1]["list"][0]["pairs"][0]
    ['lr', 0.1]
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _apart([optimizer.state_dict() for optimizer in optimizers], tensors)


def put_together(optimizers: Sequence[Optimizer], tensors: dict[str, Tensor], rest: Any) -> None:
    """Give optimizers what `taken_apart` took from others of their kind.

    >>> first, second = ([torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=rate)] for rate in (0.1, 0.2))
    >>> put_together(second, *taken_apart(first))
    >>> second[0].param_groups[0]["lr"]
    0.1
    """
    for optimizer, state in zip(optimizers, _together(rest, tensors), strict=True):
        optimizer.load_state_dict(state)


def _apart(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"state-{len(tensors)}"
        # files hold rows one after the other; a product of columns one after the other has other last bits
        order = sorted(range(value.dim()), key=value.stride, reverse=True)
        tensors[name] = value.detach().permute(order)
        return {"tensor": name, "order": order}
    if isinstance(value, dict):  # keys of a state are numbers of parameters, which are no keys of JSON
        return {"pairs": [[key, _apart(one, tensors)] for key, one in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_apart(one, tensors) for one in value]}
    return value


def _together(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        order = value["order"]
        # a copy has the alignment of memory that was computed with; products of a mapped file have other last bits
        return tensors[value["tensor"]].permute(sorted(range(len(order)), key=order.__getitem__)).clone()
    if "pairs" in value:
        return {key: _together(one, tensors) for key, one in value["pairs"]}
    return [_together(one, tensors) for one in value["list"]]
