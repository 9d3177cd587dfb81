"""Inference: compiled ahead of time, from images to labels, exported for other programs."""

from repjax.deploy.compile import CompiledModel, compile  # noqa: A004
from repjax.deploy.critical_path import CriticalPath, critical_path
from repjax.deploy.devices import Plan
from repjax.deploy.export import export, load_exported
from repjax.deploy.predictor import Predictor

__all__ = [
  "CompiledModel",
  "CriticalPath",
  "Plan",
  "Predictor",
  "compile",
  "critical_path",
  "export",
  "load_exported",
]
