"""Tasks: what a model is for, and so what a batch is, what it predicts, and which data it reads."""

from moqa.tasks.registry import TASKS, check_language_model, find_task, task_of
from moqa.tasks.task import Samples, Task

__all__ = ["TASKS", "Samples", "Task", "check_language_model", "find_task", "task_of"]
