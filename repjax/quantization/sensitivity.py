"""Which layers 8 bits hurt: each quantized alone, and the model's outputs compared."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm

from repjax.quantization.correction import corrected
from repjax.quantization.equalization import equalized_by
from repjax.quantization.graph import check_float, layers_of
from repjax.quantization.runtime import check_images, in_qdq_form, logits_of


class Sensitivity(NamedTuple):
  """What 8 bits in one layer alone do to the model.

  Attributes:
    layer: its scope.
    node: the name of its node.
    error: of the outputs, root mean square, relative to that of the outputs in float32.
    changed: share of the images whose first class becomes another.
  """

  layer: str
  node: str
  error: float
  changed: float


def sensitivity(
  proto: Any,
  images: np.ndarray,
  *,
  activations: str = "uint8",
  calibration: str = "minmax",
  per_channel: bool = True,
  weight_bits: int = 7,
  equalize: str = "activations",
  correct_bias: bool = True,
) -> list[Sensitivity]:
  """Quantizes the weights and the input of one layer at a time, all others in float32.

  No labels are needed, and images must not be those that accuracy is reported on.

  Args: as in `repjax.quantization.quantize`.

  Returns:
    All layers with weights, the worst first.

  Raises:
    InputError: as in `repjax.quantization.quantize`.
  """
  check_float(proto)
  check_images(proto, images)
  wanted = logits_of(proto, images)
  proto = equalized_by(equalize, proto, images)
  layers, rows = layers_of(proto), []
  with tempfile.TemporaryDirectory() as folder:
    for layer in tqdm.tqdm(layers, "quantizing one layer at a time", leave=False, disable=None):
      others = [other.name for other in layers if other is not layer]
      rounding: dict[str, Any] = {"per_channel": per_channel, "but": others}
      alone = in_qdq_form(
        corrected(proto, images, weight_bits, **rounding) if correct_bias else proto,
        images,
        activations=activations,
        calibration=calibration,
        per_channel=per_channel,
        weight_bits=weight_bits,
        only=[layer.name],
        inputs_only=True,
        cache=Path(folder) / "ranges.json",
      )
      got = logits_of(alone, images)
      rows.append(Sensitivity(layer.title, layer.name, *compared(got, wanted)))
  return sorted(rows, key=lambda row: -row.error)


def compared(got: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
  """Relative error, root mean square, of logits (N, K), and the share of other first classes."""
  error = np.sqrt(np.square(got - wanted).mean() / np.square(wanted).mean())
  return float(error), float((got.argmax(-1) != wanted.argmax(-1)).mean())
