"""Bias correction: rounded weights move the mean of what a layer gives; its bias moves it back.

References:
  Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction, ICCV 2019,
    section 4.2 and appendix D. https://arxiv.org/abs/1906.04721
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from repjax.quantization.finite import check_finite
from repjax.quantization.graph import Layer, constants, layers_of, with_constants
from repjax.quantization.runtime import observed
from repjax.quantization.weights import rounded

TOLERANCE = 1e-4
"""How far means may be off, relative to the largest of their layer, before the last correction."""


def with_rounded_weights(
  proto: Any, bits: int = 8, *, per_channel: bool = True, but: Sequence[str] = ()
) -> Any:
  """A model whose weights went through so few bits; everything else is as it was.

  Args:
    proto: in float32.
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
  """A model with other biases, under which rounded weights give each channel the mean it had.

  b[c] += E[y[c]] - E[y'[c]], the means of a layer's outputs before and after rounding, over images
  and pixels, borders included. What moves one layer's bias moves the means behind it, so that all
  layers are corrected at once, again and again, until no mean is off.

  Args:
    proto: in float32.
    images: (N, H, W, 3), as the graph takes them.
    bits: of the weights.
    **rounding: as in `with_rounded_weights`.

  Returns:
    A model in float32 with the weights as they were, to be quantized.

  Raises:
    InputError: a layer gives values that are not finite.
  """
  left = rounding.get("but", ())
  layers = [layer for layer in layers_of(proto) if layer.bias and layer.name not in left]
  wanted = _means(proto, layers, images)
  coarse = with_rounded_weights(proto, bits, **rounding)
  biases = {layer.bias: constants(proto)[layer.bias] for layer in layers if layer.bias}
  for _ in layers:  # the last layer's mean is right after as many rounds as there are before it
    moved = _means(with_constants(coarse, biases), layers, images)
    off = {tensor: mean - moved[tensor] for tensor, mean in wanted.items()}
    biases |= {layer.bias: biases[layer.bias] + off[layer.result] for layer in layers if layer.bias}
    largest = {tensor: np.abs(mean).max() for tensor, mean in wanted.items()}
    if all(np.abs(gap).max() <= TOLERANCE * largest[tensor] for tensor, gap in off.items()):
      break
  return with_constants(proto, biases)


def _means(proto: Any, layers: list[Layer], images: np.ndarray) -> dict[str, np.ndarray]:
  """The mean of each channel of what layers give."""
  tensors = [layer.result for layer in layers]
  sums = {tensor: np.zeros(()) for tensor in tensors}
  for batch in observed(proto, tensors, images):
    for tensor, maps in zip(tensors, batch):
      rows = np.moveaxis(maps, 1, -1).reshape(len(maps), -1, maps.shape[1])
      sums[tensor] = sums[tensor] + rows.mean(1, dtype=np.float64).sum(0)
  check_finite(proto, images, sums.values())
  return {tensor: total / len(images) for tensor, total in sums.items()}
