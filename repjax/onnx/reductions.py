"""Emitters of sums, means, maxima and pools.

JAX has no primitive for a mean: it sums and divides. So a sum is emitted together with the mean of
the same numbers, and a division by their count then uses the mean (`operators`). What nothing reads
is left out of the file.

  sum over h, w; / 49    ->    GlobalAveragePool
"""

import dataclasses
import math
from typing import Any

import numpy as np

from repjax.errors import InputError
from repjax.onnx.graph import Graph, split
from repjax.onnx.products import cropped, in_order
from repjax.onnx.values import Atom, Axes, Value, extent, flat, new_axes


def total(graph: Graph, x: Value, axes: tuple[int, ...], dtype: np.dtype) -> Value:
  """Emits the sum and the mean over some axes, and returns the sum."""
  gone, left = _parted(x, axes)
  if not gone <= set(flat(x.stored)):
    x = graph.arrange(x, x.axes)
  count = extent(gone)
  pooled = _pooled(graph, x, gone)
  if pooled is not None:
    mean, stored = pooled
    # Where a pool gives the mean, the sum is a multiple of it.
    tensor = graph.add("Mul", [mean, np.array(count, dtype)])
  else:
    x, places, stored = _cut(graph, x, gone)
    if not places:
      return dataclasses.replace(x, axes=left)
    tensor = graph.add("ReduceSum", [x.tensor, np.array(places, np.int64)], keepdims=1)
    mean = graph.add("ReduceMean", [x.tensor], axes=places, keepdims=1)
  graph.means[tensor] = mean, count
  return Value(tensor, left, stored)


def extreme(graph: Graph, op: str, x: Value, axes: tuple[int, ...]) -> Value:
  """Emits ReduceMax, ReduceMin or ReduceProd, whose axes are an attribute."""
  gone, left = _parted(x, axes)
  # A maximum of repeated numbers is the number, and need not repeat them. A product has to.
  if op == "ReduceProd" and not gone <= set(flat(x.stored)):
    x = graph.arrange(x, x.axes)
  x, places, stored = _cut(graph, x, gone)
  tensor = graph.add(op, [x.tensor], axes=places, keepdims=1) if places else x.tensor
  return Value(tensor, left, stored)


def _parted(x: Value, axes: tuple[int, ...]) -> tuple[set[Atom], Axes]:
  """Returns the atoms of the axes that are reduced, and the axes that are left."""
  left = tuple(axis for place, axis in enumerate(x.axes) if place not in axes)
  return set(flat(x.axes[axis] for axis in axes)), left


def _cut(graph: Graph, x: Value, gone: set[Atom]) -> tuple[Value, list[int], Axes]:
  """Cuts stored axes so that each is reduced as a whole or stays.

  Returns:
    The value, the places of the reduced axes, and the stored axes of the result.
  """
  x = graph.arrange(x, split(x.stored, gone.__contains__))
  places = [place for place, axis in enumerate(x.stored) if set(axis) & gone]
  return x, places, tuple(() if set(axis) & gone else axis for axis in x.stored)


def _pooled(graph: Graph, x: Value, gone: set[Atom]) -> tuple[str, Axes] | None:
  """Emits a pool for the mean over maps or over tiles of maps, else returns None.

  Maps are stored after batch and channels. Tiles are the last atoms of the maps' axes.
  """
  maps = x.stored[2:]
  if len(x.stored) != 4 or not gone or not gone <= set(flat(maps)):
    return None
  left = [tuple(atom for atom in axis if atom not in gone) for axis in maps]
  if any(axis[: len(rest)] != rest for axis, rest in zip(maps, left)):
    return None
  stored = (*x.stored[:2], *left)
  if not flat(left):
    return graph.add("GlobalAveragePool", [x.tensor]), stored
  tile = [extent(axis[len(rest) :]) for axis, rest in zip(maps, left)]
  return graph.add("AveragePool", [x.tensor], kernel_shape=tile, strides=tile), stored


def window(graph: Graph, x: Value, params: dict[str, Any], shape: Any, dtype: Any = None) -> Value:
  """Emits MaxPool for `reduce_window_max`, or AveragePool and Mul for `reduce_window_sum`.

  Args:
    graph: graph to add to.
    x: a value, stored in any order.
    params: parameters of the primitive.
    shape: logical shape of the result.
    dtype: dtype of the result of a sum. None for a maximum.

  Raises:
    InputError: the pool has a dilation that ONNX lacks, or reaches over the batch.
  """
  sizes, strides, pads = (
    params[name] for name in ("window_dimensions", "window_strides", "padding")
  )
  dilations = params["window_dilation"]
  moving = [axis for axis, row in enumerate(zip(sizes, strides, pads)) if row != (1, 1, (0, 0))]
  if set(params["base_dilation"]) != {1} or (dtype is not None and set(dilations) != {1}):
    raise InputError("a pool with dilation has no operator in the ONNX graph")
  # Maps are pooled as maps, even if the window moves along one side only.
  if len(x.axes) == 4 and set(moving) <= {1, 2}:
    moving = [1, 2]
  still = [axis for axis in range(len(x.axes)) if axis not in moving]
  if not still:
    raise InputError("a pool over the batch has no operator in the ONNX graph")
  batch, channels = x.axes[still[0]], in_order(x, flat(x.axes[axis] for axis in still[1:]))
  x = graph.arrange(x, (batch, channels, *(x.axes[axis] for axis in moving)))
  x = cropped(graph, x, [pads[axis] for axis in moving])
  attributes: dict[str, Any] = {
    "kernel_shape": [sizes[axis] for axis in moving],
    "strides": [strides[axis] for axis in moving],
    "pads": [max(pads[axis][side], 0) for side in (0, 1) for axis in moving],
  }
  maps = dict(zip(moving, new_axes(shape[axis] for axis in moving)))
  axes = tuple(maps.get(place, axis) for place, axis in enumerate(x.axes))
  stored = (*x.stored[:2], *maps.values())
  if dtype is None:
    dilated = {"dilations": [dilations[axis] for axis in moving]}
    return Value(graph.add("MaxPool", [x.tensor], **attributes, **dilated), axes, stored)
  mean = graph.add("AveragePool", [x.tensor], **attributes, count_include_pad=1)
  count = math.prod(sizes)
  tensor = graph.add("Mul", [mean, np.array(count, dtype)])
  graph.means[tensor] = mean, count
  return Value(tensor, axes, stored)
