"""Structural re-parameterization for JAX: train with branches, ship the plain network."""

import importlib
from types import ModuleType

from repjax.models import create_model, init, list_models
from repjax.reparam import FOLDS, reparameterize
from repjax.spec import ModelSpec, load

__all__ = [
  "FOLDS",
  "ModelSpec",
  "create_model",
  "init",
  "list_models",
  "load",
  "reparameterize",
]

_ROOMS = ("analysis", "data", "deploy", "onnx", "quantization", "report", "training", "weights")


def __getattr__(name: str) -> ModuleType:
  """Imports a subpackage on first use (PEP 562), so that `import repjax` stays fast."""
  if name in _ROOMS:
    return importlib.import_module(f"repjax.{name}")
  raise AttributeError(f"module 'repjax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return [*__all__, *_ROOMS]
