"""Executors: where the pieces of long work are done, in this process or on the machines of a Ray cluster."""

from typing import TYPE_CHECKING

from moqa.lazy import lazily

if TYPE_CHECKING:
    from moqa.execution.local import Executor, LocalExecutor
    from moqa.execution.registry import EXECUTORS, find_executor
    from moqa.execution.workspace import Workspace
else:
    __getattr__, __dir__ = lazily(__name__, __file__)

__all__ = ["EXECUTORS", "Executor", "LocalExecutor", "Workspace", "find_executor"]
