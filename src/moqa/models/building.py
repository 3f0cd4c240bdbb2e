"""Build models without memory for their parameters, in any number of threads at once."""

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from moqa.models.attributes import having
from moqa.tasks import task_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# bytes; no buffer of a model is this large
_LARGE = 2**30
# held while a model is built, because transformers then patches its own methods; a fork waits until none is
BUILDING = threading.RLock()
os.register_at_fork(before=BUILDING.acquire, after_in_parent=BUILDING.release, after_in_child=BUILDING.release)
# whether this thread registers parameters without memory, and whether what it does is logged
_THREAD = threading.local()
_BARS = threading.Lock()
_quiet_blocks, _had_bars = 0, False


def empty_model(config: "PretrainedConfig", dtype: torch.dtype) -> "PreTrainedModel":
    """A model without memory for its parameters; buffers get memory, because checkpoints do not hold all of them.

    >>> next(empty_model(config, torch.float32).parameters()).is_meta
    True

    Parameters and buffers have the dtypes that `from_pretrained` gives them: what a family keeps in float32 whatever
    the dtype, such as the biases of routers, is float32.
    """
    from transformers.core_model_loading import build_glob_alternation

    with BUILDING, quiet(), _parameters_on_meta(), _Factories(dtype):
        # transformers would make the dtype torch's default one, in which other threads then create their tensors
        model = task_of(config).auto_class(config).from_config(config, dtype=torch.get_default_dtype())
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    model = model.eval().requires_grad_(False)
    wide = model._get_dtype_plan(dtype)
    if wide:
        pattern = build_glob_alternation(list(wide))[0]
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point() and pattern.search(name):
                tensor.data = tensor.data.float()
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """A block in which this thread lets transformers log nothing: moqa reports problems as its own errors."""
    from transformers.utils import logging

    global _quiet_blocks, _had_bars
    _filter_log()
    before, _THREAD.quiet = getattr(_THREAD, "quiet", False), True
    # progress bars are all threads': the first of several blocks hides them, the last one shows them again
    with _BARS:
        if not _quiet_blocks:
            _had_bars = logging.is_progress_bar_enabled()
            logging.disable_progress_bar()
        _quiet_blocks += 1
    try:
        yield
    finally:
        _THREAD.quiet = before
        with _BARS:
            _quiet_blocks -= 1
            if not _quiet_blocks and _had_bars:
                logging.enable_progress_bar()


@cache
def _filter_log() -> None:
    """Let no handler of transformers' log take what a thread logs in a quiet block."""
    from transformers.utils import logging

    for handler in logging.get_logger("transformers").handlers:
        handler.addFilter(lambda _: not getattr(_THREAD, "quiet", False))


def _parameters_on_meta() -> AbstractContextManager[None]:
    _install_hook()
    return having(_THREAD, "on_meta", True)


@cache
def _install_hook() -> None:
    """Call `_without_memory` for every new parameter; never removed, because other threads may still be building."""
    register_module_parameter_registration_hook(_without_memory)  # type: ignore[arg-type]  # may return another one


def _without_memory(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """What is registered instead of a parameter; None means the parameter itself."""
    if parameter is None or parameter.is_meta or not getattr(_THREAD, "on_meta", False):
        return None
    return nn.Parameter(parameter.to("meta"), requires_grad=False)


class _Factories(TorchFunctionMode):
    """How this thread creates tensors: floating-point ones in a dtype where none is given, and those that are too large
    for a buffer without memory: a stack of experts may exceed the whole memory."""

    _makers = frozenset({
        torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.tensor, torch.arange,
        torch.linspace, torch.logspace, torch.eye, torch.scalar_tensor,
    })  # fmt: skip
    _casts = frozenset({Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type})

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, default = dict(kwargs or {}), torch.get_default_dtype()
        if func in self._makers:
            on_meta = func(*args, **{**given, "device": "meta"})
            if given.get("dtype") is None and on_meta.dtype == default:
                given["dtype"] = self._dtype
            if on_meta.nbytes >= _LARGE:
                return on_meta.to(given.get("dtype"))
        out = func(*args, **given)
        # a logarithm or a quotient of integers has the default dtype
        if func not in self._casts and isinstance(out, Tensor) and out.dtype == default != self._dtype:
            inputs = [value for value in args if isinstance(value, Tensor)]
            if inputs and not any(value.is_floating_point() for value in inputs) and given.get("dtype") is None:
                return out.to(self._dtype)
        return out
