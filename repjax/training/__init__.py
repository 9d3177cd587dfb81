"""Training, evaluation, and the conversion at the end of a run.

Public names load on first use. The training step and the optimizers thus need no package that
reads data sets.
"""

import importlib
from typing import TYPE_CHECKING, Any

from repjax import extras

if TYPE_CHECKING:
  from repjax.training.conversion import convert
  from repjax.training.evaluation import evaluate
  from repjax.training.planning import read_config
  from repjax.training.recalibration import recalibrate
  from repjax.training.run import train

__all__ = ["convert", "evaluate", "read_config", "recalibrate", "train"]

_HOMES = {
  "convert": "conversion",
  "evaluate": "evaluation",
  "read_config": "planning",
  "recalibrate": "recalibration",
  "train": "run",
}


def __getattr__(name: str) -> Any:
  """Loads a public name on first use (PEP 562)."""
  if name not in _HOMES:
    raise AttributeError(f"module 'repjax.training' has no attribute {name!r}")
  with extras.explained("repjax.training", "train"):
    return getattr(importlib.import_module(f"repjax.training.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
  return __all__
