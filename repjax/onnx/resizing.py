"""The emitter of bilinear interpolation with aligned corners.

`repjax.layers.resampling.resize_aligned` is two matrix products in JAX, one for rows and one for
columns. Runtimes have one operator for both. The operator has no weights that a quantizer would
round.

  einsum("yh,nhwc->nywc", rows, x), einsum("xw,nywc->nyxc", columns, y)    ->    Resize

A product is recognised by its matrix, whatever code has written the product.
"""

from typing import Any

import numpy as np

from repjax.layers.resampling import aligned_weights
from repjax.onnx.graph import Graph
from repjax.onnx.values import Axes, Value, new_axes

_SPACE = (1, 2)  # the axes of rows and columns in maps (N, H, W, C)


def resized(graph: Graph, x: Value, y: Value, numbers: Any) -> Value | None:
  """Emits Resize for a product that interpolates rows or columns of maps, else returns None.

  A Resize that made the maps, along the other direction, is replaced by one for both.

  Args:
    graph: graph to add to.
    x, y: operands of the product. One of them is the matrix.
    numbers: `dimension_numbers` of `dot_general`.
  """
  (contracted, batched) = numbers
  if x.is_constant == y.is_constant or any(batched) or any(len(axes) != 1 for axes in contracted):
    return None
  (first,), (second,) = contracted
  matrix, along, maps, axis = (x, first, y, second) if x.is_constant else (y, second, x, first)
  # A quick look at shapes first: most products are layers, with large weights.
  if len(maps.axes) != 4 or axis not in _SPACE or len(matrix.axes) != 2 or not matrix.is_full:
    return None
  weights = graph.arrange(matrix, (matrix.axes[1 - along], matrix.axes[along])).array
  outputs, inputs = weights.shape
  wanted = aligned_weights(inputs, outputs).astype(weights.dtype)
  if outputs == inputs or not np.array_equal(weights, wanted):
    return None
  (made,) = new_axes([outputs])
  axes = tuple(made if place == axis else own for place, own in enumerate(maps.axes))
  before = graph.arrange(maps, _channels_first(maps.axes))
  source, scales, place = before.tensor, np.ones(4, np.float32), axis + 1
  if earlier := graph.producer(source, "Resize"):
    theirs = graph.constants[earlier.inputs[2]].array
    if theirs[place] == 1:  # it resizes the other direction alone
      source, scales = earlier.inputs[0], theirs.copy()
  # An operator takes floor(scale * size). Half a pixel more keeps rounding from losing a pixel.
  # Positions follow from both sizes, not from the scales.
  scales[place] = (outputs + 0.5) / inputs
  tensor = graph.add(
    "Resize",
    [source, np.zeros(0, np.float32), scales],
    mode="linear",
    coordinate_transformation_mode="align_corners",
  )
  free = [own for place, own in enumerate(axes) if place != axis]
  order = (made, *free) if x.is_constant else (*free, made)
  return Value(tensor, order, _channels_first(axes))


def _channels_first(axes: Axes) -> Axes:
  """Returns the axes of maps (N, H, W, C) in the order (N, C, H, W)."""
  return tuple(axes[place] for place in (0, 3, 1, 2))
