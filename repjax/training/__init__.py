"""Training, evaluation, and the conversion at the end of a run."""

from repjax.training.conversion import convert
from repjax.training.evaluation import evaluate
from repjax.training.planning import read_config
from repjax.training.recalibration import recalibrate
from repjax.training.run import train

__all__ = ["convert", "evaluate", "read_config", "recalibrate", "train"]
