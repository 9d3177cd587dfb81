"""Images with labels or masks: TFDS as the source, Grain as the pipeline, uint8 batches.

No file here imports jax, so worker processes never touch an accelerator. Public names load on first
use, since TFDS and Grain take a second to import and decoding an image needs neither.
"""

import importlib
from typing import TYPE_CHECKING, Any

from repjax import extras

if TYPE_CHECKING:
  from repjax.data.augmentation import parse as parse_augmentation
  from repjax.data.pipeline import eval_batches, train_batches
  from repjax.data.sources import Source, open_source
  from repjax.data.transforms import read_image

__all__ = [
  "Source",
  "eval_batches",
  "open_source",
  "parse_augmentation",
  "read_image",
  "train_batches",
]

_HOMES = {
  "Source": ("sources", "Source"),
  "eval_batches": ("pipeline", "eval_batches"),
  "open_source": ("sources", "open_source"),
  "parse_augmentation": ("augmentation", "parse"),
  "read_image": ("transforms", "read_image"),
  "train_batches": ("pipeline", "train_batches"),
}


def __getattr__(name: str) -> Any:
  """Loads a public name on first use (PEP 562)."""
  if name not in _HOMES:
    raise AttributeError(f"module 'repjax.data' has no attribute {name!r}")
  module, attribute = _HOMES[name]
  # Decoding an image needs fewer packages than the rest, and the error names the smaller extra.
  with extras.explained(f"repjax.data.{name}", None if name == "read_image" else "train"):
    return getattr(importlib.import_module(f"repjax.data.{module}"), attribute)


def __dir__() -> list[str]:
  return __all__
