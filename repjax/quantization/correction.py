"""Bias correction: moves biases so that rounded weights change no channel's mean.

Rounding the weights of a layer moves its outputs, and on average over images not to zero. The shift
of each channel's mean is measured, and added to the channel's bias with the opposite sign. So what
is left of the error has mean zero.

  mean of a channel 1.30 before rounding and 1.25 after: its bias grows by 0.05

References:
  Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction, ICCV 2019,
    section 4.2 and appendix D. https://arxiv.org/abs/1906.04721
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from repjax.quantization.graph import GraphLayer, constants, layers_of, with_constants
from repjax.quantization.runtime import check_finite, observed
from repjax.quantization.weights import rounded

TOLERANCE = 1e-4
"""Largest error of a mean, relative to the layer's largest mean, that needs no more correction."""


SETTLED = 1e-6
"""The same error of a layer whose bias is no longer moved. It is above the noise of float32."""


def with_rounded_weights(
  proto: Any, bits: int = 8, *, per_channel: bool = True, but: Sequence[str] = ()
) -> Any:
  """Returns a model whose weights were rounded to a number of bits, with all else unchanged.

  Args:
    proto: a graph in float32.
    bits: 8 or 7.
    per_channel: one scale for each output channel, instead of one for all.
    but: names of nodes whose weights stay.
  """
  arrays = constants(proto)
  new = {
    layer.weight: rounded(weight, inputs, bits)
    for layer in layers_of(proto)
    if layer.name not in but
    for weight in [arrays[layer.weight]]
    for inputs in [layer.inputs(weight.ndim) if per_channel else tuple(range(weight.ndim))]
  }
  return with_constants(proto, new)


def corrected(proto: Any, images: np.ndarray, bits: int = 8, **rounding: Any) -> Any:
  """Returns a model whose biases make up for the rounding of its weights.

  b[c] += E[y[c]] - E[y'[c]], the means of a layer's outputs before and after rounding, over images
  and pixels, borders included. A bias that moves also moves the means of all later layers. So all
  layers are corrected at once, and again, until no mean is off.

  Args:
    proto: a graph in float32.
    images: (N, H, W, 3), in the dtype that the graph takes.
    bits: bits of the weights.
    **rounding: as in `with_rounded_weights`.

  Returns:
    A model in float32 with new biases and the weights as they were, ready to be quantized.

  Raises:
    InputError: a layer gives values that are not finite.
  """
  left = rounding.get("but", ())
  layers = [layer for layer in layers_of(proto) if layer.bias and layer.name not in left]
  wanted = _means(proto, layers, images)
  coarse = with_rounded_weights(proto, bits, **rounding)
  biases = {layer.bias: constants(proto)[layer.bias] for layer in layers if layer.bias}
  # A layer's mean is final once all layers before it are right: at most one round for each layer.
  for _ in layers:
    moved = _means(with_constants(coarse, biases), layers, images)
    off = {tensor: mean - moved[tensor] for tensor, mean in wanted.items()}
    gaps = {
      tensor: np.abs(gap).max() / (np.abs(wanted[tensor]).max() or 1.0)
      for tensor, gap in off.items()
    }
    # A layer that is right stays as it is. Moving it by the noise of its mean, in every round,
    # would move all layers after it, by more from layer to layer.
    biases |= {
      layer.bias: biases[layer.bias] + off[layer.result]
      for layer in layers
      if layer.bias and gaps[layer.result] > SETTLED
    }
    if max(gaps.values()) <= TOLERANCE:
      break
  return with_constants(proto, biases)


def _means(proto: Any, layers: list[GraphLayer], images: np.ndarray) -> dict[str, np.ndarray]:
  """Returns the mean of each channel of the layers' outputs, by tensor."""
  tensors = [layer.result for layer in layers]
  sums = {tensor: np.zeros(()) for tensor in tensors}
  counts = dict.fromkeys(tensors, 0)
  for batch in observed(proto, tensors, images):
    for tensor, maps in zip(tensors, batch):
      # A Gemm over the pixels of a map has a row for each of them, and not for each image.
      rows = np.moveaxis(maps, 1, -1).reshape(-1, maps.shape[1])  # (N * pixels, C)
      sums[tensor] = sums[tensor] + rows.sum(0, dtype=np.float64)
      counts[tensor] += len(rows)
  check_finite(proto, images, sums.values())
  return {tensor: total / counts[tensor] for tensor, total in sums.items()}
