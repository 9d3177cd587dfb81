"""Inference: models compiled ahead of time, labels of images, and exports for other programs."""

from repjax.deploy.compile import CompiledModel, compile  # noqa: A004
from repjax.deploy.critical_path import CriticalPath, critical_path
from repjax.deploy.devices import BatchPlan
from repjax.deploy.export import export, load_exported
from repjax.deploy.predictor import Predictor

__all__ = [
  "BatchPlan",
  "CompiledModel",
  "CriticalPath",
  "Predictor",
  "compile",
  "critical_path",
  "export",
  "load_exported",
]
