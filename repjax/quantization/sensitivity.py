"""Sensitivity: quantizes one layer at a time, and compares the model's outputs."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm

from repjax.errors import InputError
from repjax.quantization.correction import corrected
from repjax.quantization.equalization import equalized_by
from repjax.quantization.graph import check_float, layers_of
from repjax.quantization.qdq import in_qdq_form
from repjax.quantization.runtime import check_images, logits_of


class Sensitivity(NamedTuple):
  """The effect on a model of 8 bits in one layer alone.

  Attributes:
    layer: scope of the layer.
    node: name of the layer's node.
    error: root mean square error of the outputs, relative to the outputs in float32.
    changed: share of the images whose predicted class changes.
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
  """Quantizes the weights and the input of one layer at a time, with all other layers in float32.

  No labels are needed. Do not use the images that accuracy is reported on.

  Args: as in `repjax.quantization.quantize`.

  Returns:
    All layers with weights, the most sensitive layer first.

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
        # The ranges in float32 are measured once for all layers.
        cache=Path(folder) / "ranges.json",
      )
      got = logits_of(alone, images)
      rows.append(
        Sensitivity(layer.title, layer.name, *compared(got, wanted, f"{layer.title} in 8 bits"))
      )
  return sorted(rows, key=lambda row: -row.error)


def _share(logits: np.ndarray) -> str:
  """Returns the share of rows that are not finite, in percent."""
  return f"{(~np.isfinite(logits).all(-1)).mean():.0%}"


def compared(
  got: np.ndarray, wanted: np.ndarray, name: str = "the network in 8 bits"
) -> tuple[float, float]:
  """Returns the relative root mean square error of logits (..., K), and the share of new classes.

  Args:
    got: logits to judge.
    wanted: logits in float32.
    name: what gave `got`, for an error message.

  Raises:
    InputError: logits are not finite, or all that were wanted are 0.
  """
  check_logits(got, wanted, name)
  got, wanted = got.astype(np.float64), wanted.astype(np.float64)  # squares may overflow float32
  error = np.sqrt(np.square(got - wanted).mean() / np.square(wanted).mean())
  return float(error), float((got.argmax(-1) != wanted.argmax(-1)).mean())


def check_logits(got: np.ndarray, wanted: np.ndarray, name: str) -> None:
  """Raises InputError for logits of which no error can be measured; arguments as in `compared`."""
  for whose, logits in (("the network in float32", wanted), (name, got)):
    if not np.isfinite(logits).all():
      raise InputError(
        f"{whose} gives logits that are NaN or infinite on {_share(logits)} of the images. Has the "
        "network diverged, or does a layer overflow?"
      )
  if not wanted.any():
    raise InputError(
      "the network in float32 gives only zeros, against which no error can be measured. Is it "
      "trained, and has it the right weights?"
    )
