"""How what layers read becomes whole numbers: found on images, kept, and given to a file."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from repjax.deploy.quantization.graph import layers_of
from repjax.deploy.quantization.runtime import check_images, observed
from repjax.errors import InputError, unknown

LIMITS = {"uint8": (0, 255), "int8": (-128, 127)}
"""The whole numbers of activations; those of int8 are multiples of one scale, as TensorRT's are."""
# Whole numbers go through these as they are, so that what comes out has the scale of what goes in.
_DIRECT = {"AveragePool", "Flatten", "Gather", "MaxPool", "Reshape", "Transpose"}


class Rounding(NamedTuple):
  """How a layer's input becomes whole numbers q = round(x / scale) + zero, and its weights do.

  Attributes:
    layer: its scope.
    scale: above 0.
    zero: the whole number that stands for 0.
    together: all its weights have one scale, instead of one for each output.
  """

  layer: str
  scale: float
  zero: int
  together: bool


def roundings_of(proto: Any, images: np.ndarray, activations: str = "uint8") -> list[Rounding]:
  """How each layer's input and weights are to be rounded, by the values seen.

  Args:
    proto: from `repjax.deploy.to_onnx` in float32.
    images: to calibrate with, as in `repjax.deploy.quantize`.
    activations: "uint8" or "int8".

  Returns:
    One for each layer, in the order in which they compute. A range goes from the smallest to the
    largest value, and holds 0.
  """
  if activations not in LIMITS:
    raise unknown("kind of activations", activations, LIMITS)
  check_images(proto, images)
  layers, ways = layers_of(proto), _ways(proto)
  tensors = list(dict.fromkeys(way[-1] for way in ways.values()))
  ends = dict.fromkeys(tensors, (0.0, 0.0))
  for batch in observed(proto, tensors, images):
    for tensor, values in zip(tensors, batch):
      low, high = ends[tensor]
      ends[tensor] = min(low, float(values.min())), max(high, float(values.max()))
  ranks = {tensor.name: len(tensor.dims) for tensor in proto.graph.initializer}
  return [
    Rounding(
      layer.title,
      *_scale(*ends[ways[layer.source][-1]], activations),
      len(layer.inputs(ranks[layer.weight])) == ranks[layer.weight],
    )
    for layer in layers
  ]


def _ways(proto: Any) -> dict[str, list[str]]:
  """What each layer reads, to the tensors that it is made from without other numbers, it first."""
  makers = {node.output[0]: node for node in proto.graph.node}

  def way(tensor: str) -> list[str]:
    node = makers.get(tensor)
    return [tensor, *(way(node.input[0]) if node and node.op_type in _DIRECT else ())]

  return {layer.source: way(layer.source) for layer in layers_of(proto)}


def _scale(low: float, high: float, activations: str) -> tuple[float, int]:
  """Scale and zero for values from `low` to `high`, between which 0 lies."""
  if activations == "int8":
    return float(np.float32(max(-low, high) / 127)) or 1.0, 0
  scale = (high - low) / 255 or 1.0
  return float(np.float32(scale)), round(-low / scale)


def scales_of(proto: Any, how: Sequence[Rounding]) -> dict[str, tuple[float, int]]:
  """Tensor to scale and zero of what the layers of a graph read, and of what that is made from.

  Raises:
    InputError: its layers are others.
  """
  layers = layers_of(proto)
  if [layer.title for layer in layers] != [row.layer for row in how]:
    raise InputError("these roundings are not of this graph: its layers are others")
  ways = _ways(proto)
  return {
    tensor: (row.scale, row.zero)
    for layer, row in zip(layers, how)
    for tensor in ways[layer.source]
  }
