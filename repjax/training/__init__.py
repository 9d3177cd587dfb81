"""Training, evaluation and the conversion that ends a run."""

from repjax.training.conversion import convert
from repjax.training.evaluation import evaluate
from repjax.training.loop import train
from repjax.training.recalibration import recalibrate
from repjax.training.settings import read_config

__all__ = ["convert", "evaluate", "read_config", "recalibrate", "train"]
