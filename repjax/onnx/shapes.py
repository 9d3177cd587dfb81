"""Emitters of operators that change shapes.

Reshapes, transpositions and broadcasts change a value's axes, and rarely add a node. Slices, pads
and concatenations work along stored axes, so that the axes they change are isolated first.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from repjax.errors import InputError
from repjax.onnx import values
from repjax.onnx.graph import Graph
from repjax.onnx.values import Value, new_axes
from repjax.program import Equation


def shape_of(equation: Equation) -> tuple[Any, ...]:
  """Returns the logical shape of an equation's first output."""
  return equation.outputs[0].aval.shape


def reshape(graph: Graph, equation: Equation, x: Value) -> Value:
  """Emits nothing if axes are only split and joined, else a Reshape of ordered numbers."""
  shape = shape_of(equation)
  seen = values.reshape(x, shape)
  if seen is None:
    axes = new_axes(shape)
    seen = graph.reshaped(graph.arrange(x, x.axes), axes)
  return seen


def transpose(graph: Graph, equation: Equation, x: Value) -> Value:
  """Permutes logical axes, and emits nothing."""
  return values.transpose(x, equation.params["permutation"])


def broadcast(graph: Graph, equation: Equation, x: Value) -> Value:
  """Repeats numbers along new logical axes, and emits nothing."""
  return values.broadcast(x, equation.params["shape"], equation.params["broadcast_dimensions"])


def stack(graph: Graph, equation: Equation, *parts: Value) -> Value:
  """Emits Concat along a new axis of length 1 in each part."""
  axis = equation.params["axis"]
  axes = [(*v.axes[:axis], (), *v.axes[axis:]) for v in parts]
  wider = [dataclasses.replace(v, axes=own) for v, own in zip(parts, axes)]
  return _joined(graph, axis, shape_of(equation), wider)


def concatenate(graph: Graph, equation: Equation, *parts: Value) -> Value:
  """Emits Concat along an axis."""
  return _joined(graph, equation.params["dimension"], shape_of(equation), parts)


def _joined(graph: Graph, axis: int, shape: Sequence[Any], parts: Sequence[Value]) -> Value:
  """Joins values along an axis. Parts of length 0 are left out.

  All other axes get the same atoms, and all parts are stored like the first full part.
  """
  parts = [part for part in parts if part.shape[axis] != 0]
  if len(parts) == 1:
    return parts[0]
  rank = len(parts[0].axes)
  places = [(place,) * len(parts) for place in range(rank) if place != axis]
  found = values.aligned(parts, places) or values.aligned([*map(graph.plain, parts)], places)
  assert found is not None  # plain values have one atom for each axis, of the same length
  first = next((v for v in found if not v.is_constant and v.is_full), found[0])
  first, (place,) = graph.isolated(first, [axis])
  stored = first.stored
  tensors = [
    graph.arrange(v, (*stored[:place], v.axes[axis], *stored[place + 1 :])).tensor for v in found
  ]
  joined = new_axes([shape[axis]])[0]
  axes = (*first.axes[:axis], joined, *first.axes[axis + 1 :])
  tensor = graph.add("Concat", tensors, axis=place)
  return Value(tensor, axes, (*stored[:place], joined, *stored[place + 1 :]))


def _resized(
  x: Value, tensor: str, axes: Sequence[int], places: Sequence[int], shape: Any
) -> Value:
  """Returns a new tensor's value, in which some axes, each stored alone, have new lengths."""
  fresh = new_axes(shape[axis] for axis in axes)
  logical, stored = list(x.axes), list(x.stored)
  for axis, place, new in zip(axes, places, fresh):
    logical[axis] = stored[place] = new
  return Value(tensor, tuple(logical), tuple(stored))


def _from_end(number: Any, size: Any) -> int:
  """Returns a place on an axis as a number.

  A place that depends on the batch, such as batch - 1, is counted from the end: -1.
  """
  if isinstance(number, int):
    return number
  # Counted from the end, the end itself would be 0, which means the start. A huge number means it.
  return int(number - size) or np.iinfo(np.int64).max


def _cut(
  graph: Graph, x: Value, starts: Any, ends: Any, steps: Any, shape: tuple[Any, ...]
) -> Value:
  """Emits Slice along the axes whose length changes."""
  axes = [axis for axis, size in enumerate(shape) if size != x.shape[axis]]
  if not axes:
    return x
  x, places = graph.isolated(x, axes)
  sizes = x.shape
  rows = ([_from_end(row[axis], sizes[axis]) for axis in axes] for row in (starts, ends))
  numbers = [*rows, places, [steps[axis] for axis in axes]]
  tensor = graph.add("Slice", [x.tensor, *(np.array(row, np.int64) for row in numbers)])
  return _resized(x, tensor, axes, places, shape)


def gather(graph: Graph, equation: Equation, x: Value, indices: Value) -> Value:
  """Emits Slice for a part at known places, or Gather for several rows along one axis.

  Raises:
    InputError: the places are computed, or lie along several axes at once.
  """
  numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
  mapped, gone = numbers.start_index_map, numbers.collapsed_slice_dims
  places = graph.arrange(indices, indices.axes).array if indices.is_constant else None
  # One place: x[:, 3] or x[..., -1], a slice whose axes of length 1 may be dropped.
  if places is not None and places.ndim == 1:
    starts = dict(zip(mapped, places.tolist()))
    moving = [axis for axis, size in enumerate(sizes) if size != x.shape[axis]]
    ends = {axis: starts[axis] + sizes[axis] for axis in moving}
    x = _cut(graph, x, starts, ends, dict.fromkeys(moving, 1), sizes)
    axes = tuple(axis for place, axis in enumerate(x.axes) if place not in gone)
    return dataclasses.replace(x, axes=axes)
  if places is None or places.ndim != 2 or mapped != gone or len(mapped) != 1:
    raise InputError(
      "indices that are computed, or that pick along several axes at once, have no operator in the "
      "ONNX graph. Index one axis after the other, x[:, ::2][:, :, ::2]"
    )
  x, (place,) = graph.isolated(x, mapped)
  tensor = graph.add("Gather", [x.tensor, places[:, 0].astype(np.int64)], axis=place)
  (new,) = new_axes(places.shape[:1])
  axes = [axis for number, axis in enumerate(x.axes) if number not in gone]
  # JAX may put the picked axis anywhere in the result: where no offset dimension is.
  (here,) = set(range(len(axes) + 1)) - set(numbers.offset_dims)
  stored = (*x.stored[:place], new, *x.stored[place + 1 :])
  return Value(tensor, (*axes[:here], new, *axes[here:]), stored)


def cut_out(graph: Graph, equation: Equation, x: Value) -> Value:
  """Emits Slice for the primitive `slice`."""
  params = equation.params
  steps = params["strides"] or (1,) * len(x.axes)
  return _cut(graph, x, params["start_indices"], params["limit_indices"], steps, shape_of(equation))


def reverse(graph: Graph, equation: Equation, x: Value) -> Value:
  """Emits Slice with steps of -1."""
  axes = [axis for axis in equation.params["dimensions"] if x.axes[axis]]
  x, places = graph.isolated(x, axes)
  ends = [np.iinfo(np.int64).min] * len(axes)
  numbers = [[-1] * len(axes), ends, places, [-1] * len(axes)]
  return graph.derived("Slice", x, *(np.array(row, np.int64) for row in numbers))


def split(graph: Graph, equation: Equation, x: Value) -> list[Value]:
  """Emits a Slice for each part."""
  axis, start, parts = equation.params["axis"], 0, []
  for size, output in zip(equation.params["sizes"], equation.outputs):
    starts, ends = {axis: start}, {axis: start + size}
    shape = output.aval.shape
    parts.append(_cut(graph, x, starts, ends, {axis: 1}, shape) if size != x.shape[axis] else x)
    start += size
  return parts


def pad(graph: Graph, equation: Equation, x: Value, value: Value) -> Value:
  """Emits Pad with a known number. Negative padding takes numbers away.

  Raises:
    InputError: the number is computed, or numbers are padded in between.
  """
  sides = equation.params["padding_config"]
  if any(between for _, _, between in sides) or not value.is_constant:
    raise InputError("padding between numbers has no operator in the ONNX graph")
  axes = [axis for axis, side in enumerate(sides) if side != (0, 0, 0)]
  if not axes:
    return x
  x, places = graph.isolated(x, axes)
  pads = np.zeros((2, len(x.stored)), np.int64)
  for axis, place in zip(axes, places):
    pads[:, place] = sides[axis][:2]
  tensor = graph.add("Pad", [x.tensor, pads.ravel(), value.array.reshape(())])
  return _resized(x, tensor, axes, places, shape_of(equation))
