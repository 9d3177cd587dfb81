"""Sums, means, maxima and pools."""

import dataclasses
import math
from typing import Any

import numpy as np

from repjax.errors import InputError
from repjax.onnx.graph import Graph, split
from repjax.onnx.products import cropped, in_order
from repjax.onnx.values import Atom, Axes, Value, extent, flat, new_axes


def total(graph: Graph, x: Value, axes: tuple[int, ...], dtype: np.dtype) -> Value:
  """`reduce_sum`; the mean is kept beside it, since a division usually follows."""
  gone, left = _parted(x, axes)
  if not gone <= set(flat(x.stored)):
    x = graph.arrange(x, x.axes)
  count = extent(gone)
  pooled = _pooled(graph, x, gone)
  if pooled is not None:
    mean, stored = pooled
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
  """`reduce_max` and its like, by an operator whose axes are an attribute."""
  gone, left = _parted(x, axes)
  if op == "ReduceProd" and not gone <= set(flat(x.stored)):
    x = graph.arrange(x, x.axes)
  x, places, stored = _cut(graph, x, gone)
  tensor = graph.add(op, [x.tensor], axes=places, keepdims=1) if places else x.tensor
  return Value(tensor, left, stored)


def _parted(x: Value, axes: tuple[int, ...]) -> tuple[set[Atom], Axes]:
  """The atoms of some axes, and the other axes."""
  left = tuple(axis for place, axis in enumerate(x.axes) if place not in axes)
  return set(flat(x.axes[axis] for axis in axes)), left


def _cut(graph: Graph, x: Value, gone: set[Atom]) -> tuple[Value, list[int], Axes]:
  """A value whose stored axes go as a whole or stay, which go, and what is stored then."""
  x = graph.arrange(x, split(x.stored, gone.__contains__))
  places = [place for place, axis in enumerate(x.stored) if set(axis) & gone]
  return x, places, tuple(() if set(axis) & gone else axis for axis in x.stored)


def _pooled(graph: Graph, x: Value, gone: set[Atom]) -> tuple[str, Axes] | None:
  """The mean over maps, or over tiles of maps, which lie behind batch and channels."""
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
  """`reduce_window_max` as MaxPool; `reduce_window_sum`, with a dtype, as AveragePool times size.

  Args:
    graph: to add to.
    x: of any layout.
    params: of the primitive.
    shape: logical, of the result.
    dtype: of the result of a sum.
  """
  sizes, strides, pads = (
    params[name] for name in ("window_dimensions", "window_strides", "padding")
  )
  dilations = params["window_dilation"]
  moving = [axis for axis, row in enumerate(zip(sizes, strides, pads)) if row != (1, 1, (0, 0))]
  if set(params["base_dilation"]) != {1} or (dtype is not None and set(dilations) != {1}):
    raise InputError("a pool with dilation has no place in the ONNX graph here")
  if len(x.axes) == 4 and set(moving) <= {1, 2}:
    moving = [1, 2]
  still = [axis for axis in range(len(x.axes)) if axis not in moving]
  if not still:
    raise InputError("a pool over the batch has no place in the ONNX graph here")
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
