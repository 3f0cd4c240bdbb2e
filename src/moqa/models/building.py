"""Build models without memory for their parameters, in any number of threads at once."""

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

# bytes; no buffer of a model is this large
_LARGE = 2**30
# held while a model is built: transformers then changes the default dtype of all threads, and patches its own methods
BUILDING = threading.RLock()
# whether this thread registers parameters without memory
_THREAD = threading.local()
_VERBOSITY_LOCK = threading.Lock()
_quiet_blocks, _verbosity = 0, 0


def empty_model(config: "PretrainedConfig", dtype: torch.dtype) -> "PreTrainedModel":
    """A model without memory for its parameters; buffers get memory, because checkpoints do not hold all of them.

    >>> next(empty_model(config, torch.float32).parameters()).is_meta
    True

    Parameters and buffers have the dtypes that `from_pretrained` gives them: what a family keeps in float32 whatever
    the dtype, such as the biases of routers, is float32.
    """
    from transformers.core_model_loading import build_glob_alternation

    with BUILDING, quiet(), _parameters_on_meta(), _LargeOnMeta():
        model = task_of(config).auto_class(config).from_config(config, dtype=dtype).eval().requires_grad_(False)
    wide = model._get_dtype_plan(dtype)
    if wide:
        pattern = build_glob_alternation(list(wide))[0]
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point() and pattern.search(name):
                tensor.data = tensor.data.float()
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """A block in which transformers logs nothing: moqa reports problems as its own errors."""
    from transformers.utils import logging

    global _quiet_blocks, _verbosity
    logging.disable_progress_bar()
    # blocks of several threads overlap: the first one silences the log, the last one restores it
    with _VERBOSITY_LOCK:
        if not _quiet_blocks:
            _verbosity = logging.get_verbosity()
            logging.set_verbosity(logging.CRITICAL)
        _quiet_blocks += 1
    try:
        yield
    finally:
        with _VERBOSITY_LOCK:
            _quiet_blocks -= 1
            if not _quiet_blocks:
                logging.set_verbosity(_verbosity)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    _install_hook()
    _THREAD.on_meta = True
    try:
        yield
    finally:
        _THREAD.on_meta = False


@cache
def _install_hook() -> None:
    """Call `_without_memory` for every new parameter; never removed, because other threads may still be building."""
    register_module_parameter_registration_hook(_without_memory)  # type: ignore[arg-type]  # may return another one


def _without_memory(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """What is registered instead of a parameter; None means the parameter itself."""
    if parameter is None or parameter.is_meta or not getattr(_THREAD, "on_meta", False):
        return None
    return nn.Parameter(parameter.to("meta"), requires_grad=False)


class _LargeOnMeta(TorchFunctionMode):
    """Create tensors that are too large for a buffer without memory: a stack of experts may exceed the whole memory."""

    _makers = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._makers:
            on_meta = func(*args, **{**(kwargs or {}), "device": "meta"})
            if on_meta.nbytes >= _LARGE:
                return on_meta
        return func(*args, **(kwargs or {}))
