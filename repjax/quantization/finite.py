"""Values that are not finite, found while a model is observed."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from repjax.errors import InputError
from repjax.quantization.graph import layers_of
from repjax.quantization.runtime import observed


def check_finite(proto: Any, images: np.ndarray, found: Iterable[np.ndarray]) -> None:
  """Raises InputError, which names the first layer that gives NaN or infinite values, if one does.

  Args:
    proto: the model that was observed.
    images: on which.
    found: what came of it; NaN and infinity must have passed into it.
  """
  if all(np.isfinite(values).all() for values in found):
    return
  layers = layers_of(proto)
  bad = set()
  for batch in observed(proto, [layer.result for layer in layers], images):
    bad |= {number for number, maps in enumerate(batch) if not np.isfinite(maps).all()}
  where = f"the layer {layers[min(bad)].title}" if bad else "an operator between layers"
  raise InputError(
    f"{where} gives NaN or infinite values on the images to calibrate with, and 8 bits have no "
    "range for these; has the network diverged, or do its inputs hold such values?"
  )
