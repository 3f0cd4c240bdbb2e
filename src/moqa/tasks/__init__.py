"""Tasks: what a model is for. They define what a batch is, what is predicted, and which data is read."""

from moqa.tasks.registry import TASKS, check_language_model, find_task, task_of
from moqa.tasks.task import Samples, Task

__all__ = ["TASKS", "Samples", "Task", "check_language_model", "find_task", "task_of"]
