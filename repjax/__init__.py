"""Structural re-parameterization for JAX: train with branches, ship the plain network.

Every name loads on first use (PEP 562), so that `repjax --help` and the processes that read images
start without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

# Notes from now on whether a process that is forked can use its devices.
import repjax.devices  # noqa: F401

if TYPE_CHECKING:
  from repjax.expansion import expand
  from repjax.fusion import fuse
  from repjax.models import create_model, init, list_models
  from repjax.pretrained import load
  from repjax.recognition import FOLDS
  from repjax.reparam import reparameterize
  from repjax.spec import ModelSpec
  from repjax.weights.published import list_pretrained

__version__ = "0.1.0"

__all__ = [
  "FOLDS",
  "ModelSpec",
  "create_model",
  "expand",
  "fuse",
  "init",
  "list_models",
  "list_pretrained",
  "load",
  "reparameterize",
]

_MODULE_OF = {
  "FOLDS": "recognition",
  "ModelSpec": "spec",
  "create_model": "models",
  "expand": "expansion",
  "fuse": "fusion",
  "init": "models",
  "list_models": "models",
  "list_pretrained": "weights.published",
  "load": "pretrained",
  "reparameterize": "reparam",
}
_MODULES = (
  *("algebra", "analysis", "data", "deploy", "disk", "errors", "expansion", "fusion", "layers"),
  *("models", "nnx", "onnx", "quantization", "recognition", "reparam", "report", "runs"),
  *("segmentation", "spec", "training", "weights"),
)


def __getattr__(name: str) -> Any:
  """Returns a public name, or a module of the package, and loads what the name needs."""
  if name in _MODULE_OF:
    return getattr(importlib.import_module(f"repjax.{_MODULE_OF[name]}"), name)
  if name in _MODULES:
    return importlib.import_module(f"repjax.{name}")
  raise AttributeError(f"module 'repjax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return [*__all__, *_MODULES]
