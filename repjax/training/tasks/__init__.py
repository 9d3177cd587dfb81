"""Tasks: what a model learns. The step, the loop, evaluation and conversion know `Task` alone.

A further task is a file here with a frozen dataclass that has the members of `Task`, and a line in
TASKS.
"""

import dataclasses

from repjax.config import Config, default_of
from repjax.training.tasks.base import Task
from repjax.training.tasks.classification import Classification
from repjax.training.tasks.segmentation import Segmentation

__all__ = ["CLASSIFICATION", "TASKS", "Classification", "Segmentation", "Task", "create"]

TASKS: dict[str, type[Task]] = {"classification": Classification, "segmentation": Segmentation}
"""Name to class, as `config.task` and `ModelSpec.task` name a task."""


CLASSIFICATION = Classification()
"""Classification with plain targets, the task of steps that name none."""


def create(name: str, config: Config) -> Task:
  """Builds a task with the values that a config has for its fields.

  Args:
    name: a key of TASKS.
    config: a config. A field that it lacks has its default, since evaluation needs few fields.
  """
  fields = dataclasses.fields(TASKS[name])  # pyright: ignore[reportArgumentType]
  return TASKS[name](**{row.name: config.get(row.name, default_of(row.name)) for row in fields})
