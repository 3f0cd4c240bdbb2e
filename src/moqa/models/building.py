"""Models that are built without memory for their parameters, in any number of threads at once."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from moqa.tasks import task_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# bytes that no buffer has
_LARGE = 2**30
# held while models are built: meanwhile transformers changes the default dtype of all threads, and its own methods
BUILDING = threading.RLock()
# of the threads in which parameters are registered without memory
_HERE = threading.local()
_LOUDNESS = threading.Lock()
_quiet_blocks, _verbosity = 0, 0


def empty_model(config: "PretrainedConfig", dtype: torch.dtype) -> "PreTrainedModel":
    """A model without memory for its parameters; buffers are made for real, no checkpoint holds all of them.

    >>> next(empty_model(config, torch.float32).parameters()).is_meta
    True
    """
    with BUILDING, quiet(), _parameters_on_meta(), _LargeOnMeta():
        return task_of(config).auto_class().from_config(config, dtype=dtype).eval().requires_grad_(False)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own reports: what is wrong becomes an error of ours."""
    from transformers.utils import logging

    global _quiet_blocks, _verbosity
    logging.disable_progress_bar()
    # blocks of several threads overlap: the first one makes it quiet, the last one leaves it as it was
    with _LOUDNESS:
        if not _quiet_blocks:
            _verbosity = logging.get_verbosity()
            logging.set_verbosity(logging.CRITICAL)
        _quiet_blocks += 1
    try:
        yield
    finally:
        with _LOUDNESS:
            _quiet_blocks -= 1
            if not _quiet_blocks:
                logging.set_verbosity(_verbosity)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    _listen()
    _HERE.on_meta = True
    try:
        yield
    finally:
        _HERE.on_meta = False


@cache
def _listen() -> None:
    """Hear of every parameter from now on; once for the process, for others may be building when this one is done."""
    register_module_parameter_registration_hook(_without_memory)  # type: ignore[arg-type]  # may give another one


def _without_memory(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """What is registered in place of a parameter; None: the parameter itself."""
    if parameter is None or parameter.is_meta or not getattr(_HERE, "on_meta", False):
        return None
    return nn.Parameter(parameter.to("meta"), requires_grad=False)


class _LargeOnMeta(TorchFunctionMode):
    """Tensors too large for a buffer have no memory from the start: a stack of experts may exceed all there is."""

    _makers = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._makers:
            found = func(*args, **{**(kwargs or {}), "device": "meta"})
            if found.nbytes >= _LARGE:
                return found
        return func(*args, **(kwargs or {}))
