"""Engines: where the pieces of long work are done, in this process or on the machines of a Ray cluster."""

from moqa.execution.local import Executor, LocalExecutor
from moqa.execution.registry import EXECUTORS, find_executor
from moqa.execution.workspace import Workspace

__all__ = ["EXECUTORS", "Executor", "LocalExecutor", "Workspace", "find_executor"]
