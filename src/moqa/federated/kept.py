"""Finished rounds as one file, from which a server goes on that was killed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from moqa.errors import MoqaError
from moqa.federated.updates import State
from moqa.storage.artifact import write_whole

_STATE = "moqa-federated"


def write_rounds(path: Path, state: Mapping[str, Any], model: Mapping[str, Tensor]) -> None:
    """Write a strategy's state and the model; a kill leaves the earlier file or the new one.

    >>> write_rounds(Path("rounds.safetensors"), {"rounds": []}, {"w": torch.ones(2)})
    >>> read_rounds(Path("rounds.safetensors"))
    ({'rounds': []}, {'w': tensor([1., 1.])})
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.items()}
    write_whole(path, save(tensors, metadata={_STATE: json.dumps(state)}))


def read_rounds(path: Path) -> tuple[dict[str, Any], State]:
    """State and model of a file.

    Raises:
        MoqaError: if it was written by something else.
    """
    try:
        with safe_open(path, "pt") as file:
            state = json.loads((file.metadata() or {})[_STATE])
            return state, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise MoqaError(f"{path} has no finished rounds ({error})", "remove it to begin anew") from None
