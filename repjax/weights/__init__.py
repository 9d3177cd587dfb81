"""Checkpoints of different projects: reads them, maps them to repjax's trees, and writes them."""

from repjax.weights.files import read
from repjax.weights.recognition import Recognition, recognize
from repjax.weights.translation import from_torch, to_torch
from repjax.weights.workdirs import export_weights, import_weights

__all__ = [
  "Recognition",
  "export_weights",
  "from_torch",
  "import_weights",
  "read",
  "recognize",
  "to_torch",
]
