"""The tasks by name, and the task of a model's configuration."""

from pathlib import Path
from typing import TYPE_CHECKING

from moqa.errors import MoqaError
from moqa.registry import check_known
from moqa.tasks.causal_lm import CausalLM
from moqa.tasks.image_classification import ImageClassification
from moqa.tasks.policy import Policy
from moqa.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TASKS: dict[str, Task] = {task.name: task for task in (Policy(), CausalLM(), ImageClassification())}


def find_task(name: str) -> Task:
    """A task by the name that a profile recorded.

    Raises:
        MoqaError: if there is none.
    """
    check_known("task", name, TASKS)
    return TASKS[name]


def task_of(config: "PretrainedConfig", folder: Path | None = None) -> Task:
    """The task of a model's configuration; if several tasks fit, its `architectures` decide.

    >>> task_of(model.config).name
    'causal_lm'

    Args:
        config: of the model.
        folder: where it was read from, for the message.

    Raises:
        MoqaError: if no task fits.
    """
    fitting = [task for task in TASKS.values() if task.accepts(config)]
    named = [task for task in fitting if set(config.architectures or ()) & _class_names(task, config)]
    found = named or fitting
    if not found:
        *others, last = (f"{task.kind}s" for task in TASKS.values())
        kinds = f"{', '.join(others)} and {last}"
        raise MoqaError(f"{folder or 'the model'} is a {config.model_type}", f"moqa works on {kinds} of transformers")
    return found[0]


def check_language_model(config: "PretrainedConfig", what: str | Path) -> Task:
    """The task of a model that writes text; others are refused.

    Args:
        config: of the model.
        what: the model as the user gave it.

    Raises:
        MoqaError: naming the kind of the model.
    """
    task = task_of(config)
    if not task.writes_samples:
        article = "an" if task.kind[0] in "aeiou" else "a"
        raise MoqaError(f"{what} is {article} {task.kind}", "give a causal language model")
    return task


def _class_names(task: Task, config: "PretrainedConfig") -> set[str]:
    found = task.auto_class(config)._model_mapping[type(config)]
    return {kind.__name__ for kind in (found if isinstance(found, tuple) else (found,))}
