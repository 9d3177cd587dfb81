"""Convolutions and matrix products, as the operators that runtimes know for them."""

import dataclasses
from typing import Any

import numpy as np

from repjax.errors import InputError
from repjax.onnx.graph import Graph
from repjax.onnx.values import Axes, Axis, Value, aligned, extent, flat, new_axes, renewed

SMALL = 2**20
"""Numbers in the matrices of a product in groups that is written as a convolution: few enough to
stay in a cache, since a convolution reads them once for each image."""


def convolution(graph: Graph, x: Value, kernel: Value, params: dict[str, Any], shape: Any) -> Value:
  """`conv_general_dilated` as Conv; channels of its input lie as they did before.

  Args:
    graph: to add to.
    x: of any layout.
    kernel: likewise; known or not.
    params: of the primitive.
    shape: logical, of the result.
  """
  if params["batch_group_count"] != 1 or set(params["lhs_dilation"]) != {1}:
    raise InputError(
      "a convolution with lhs_dilation (a transposed one, nn.ConvTranspose) or batch groups has no "
      "place in the ONNX graph here"
    )
  numbers, groups = params["dimension_numbers"], params["feature_group_count"]
  (batch, channel, *space), (out, into, *taps) = numbers.lhs_spec, numbers.rhs_spec
  if groups == 1:
    x, kernel = _shared(graph, x, kernel, [(channel, into)])
  inputs = in_order(x, x.axes[channel]) if groups == 1 else x.axes[channel]
  pads = params["padding"]
  x = graph.arrange(x, (x.axes[batch], inputs, *(x.axes[axis] for axis in space)))
  x = cropped(graph, x, pads)
  ordered = (kernel.axes[out], inputs if groups == 1 else kernel.axes[into])
  kernel = graph.arrange(kernel, (*ordered, *(kernel.axes[axis] for axis in taps)))
  tensor = graph.add(
    "Conv",
    [x.tensor, kernel.tensor],
    kernel_shape=[extent(axis) for axis in kernel.stored[2:]],
    strides=list(params["window_strides"]),
    dilations=list(params["rhs_dilation"]),
    pads=[max(pad, 0) for side in (0, 1) for pad in (pair[side] for pair in pads)],
    group=groups,
  )
  maps = new_axes(shape[axis] for axis in numbers.out_spec[2:])
  stored = (x.stored[0], kernel.stored[0], *maps)
  axes = dict(zip(numbers.out_spec, stored))
  return Value(tensor, tuple(axes[axis] for axis in range(len(axes))), stored)


def cropped(graph: Graph, x: Value, pads: Any) -> Value:
  """Maps without the pixels that negative padding takes away."""
  if min(min(pair) for pair in pads) >= 0:
    return x
  sides = [[0, 0, *(min(pair[side], 0) for pair in pads)] for side in (0, 1)]
  x = graph.derived("Pad", x, np.array(sides, np.int64).ravel())
  sizes = [
    extent(axis) + sum(min(pad, 0) for pad in pair) for axis, pair in zip(x.stored[2:], pads)
  ]
  return dataclasses.replace(x, stored=(*x.stored[:2], *new_axes(sizes)))


def product(graph: Graph, x: Value, y: Value, numbers: Any) -> Value:
  """`dot_general` as Gemm, as a 1x1 Conv where channels are not last, or else as MatMul.

  Args:
    graph: to add to.
    x: (..., K, ...).
    y: (..., K, ...).
    numbers: `dimension_numbers` of the primitive.
  """
  (contracted, other_contracted), (batched, other_batched) = numbers
  pairs = [*zip(contracted, other_contracted), *zip(batched, other_batched)]
  x, y = _shared(graph, x, renewed(y), pairs)
  k, b = (flat(x.axes[axis] for axis in axes) for axes in (contracted, batched))
  free, other_free = (
    tuple(axis for place, axis in enumerate(value.axes) if place not in taken)
    for value, taken in ((x, (*contracted, *batched)), (y, (*other_contracted, *other_batched)))
  )
  axes = (*(x.axes[axis] for axis in batched), *free, *other_free)
  if x.is_constant:  # a kernel, which is the second here
    x, y, other_free = y, x, free
  if not x.is_full:
    x = graph.arrange(x, x.axes)
  tensor, stored = (
    _pointwise(graph, x, y, b, k, flat(other_free))
    or _gemm(graph, x, y, b, k, flat(other_free))
    or _matmul(graph, x, y, b, k, flat(other_free))
  )
  return Value(tensor, axes, stored)


_Stored = tuple[str, Axes]


def _pointwise(graph: Graph, x: Value, y: Value, b: Axis, k: Axis, outputs: Axis) -> _Stored | None:
  """A 1x1 convolution: over channels of maps, or in groups of few numbers."""
  have = flat(x.stored)
  channels = in_order(x, (*b, *k)) if not b else (*b, *k)
  places = sorted(have.index(atom) for atom in channels)
  if not channels or places != list(range(places[0], places[0] + len(places))):
    return None
  before, after = have[: places[0]], have[places[-1] + 1 :]
  if not (y.is_constant and (after or (b and extent((*b, *k, *outputs)) <= SMALL))):
    return None
  maps = x.stored[2:] if len(x.stored) == 4 and flat(x.stored[2:]) == after else (after, ())
  x = graph.arrange(x, (before, channels, *maps))
  kernel = graph.arrange(y, ((*b, *outputs), k if b else channels, (), ()))
  tensor = graph.add(
    "Conv",
    [x.tensor, kernel.tensor],
    kernel_shape=[1, 1],
    strides=[1, 1],
    dilations=[1, 1],
    pads=[0, 0, 0, 0],
    group=extent(b),
  )
  return tensor, (before, (*b, *outputs), *maps)


def _gemm(graph: Graph, x: Value, y: Value, b: Axis, k: Axis, outputs: Axis) -> _Stored | None:
  """A matrix times a matrix."""
  if b or not y.is_full:
    return None
  k = in_order(x, k)
  rows = tuple(atom for atom in flat(x.stored) if atom not in k)
  x, y = graph.arrange(x, (rows, k)), graph.arrange(y, (k, outputs))
  return graph.add("Gemm", [x.tensor, y.tensor]), (rows, outputs)


def _matmul(graph: Graph, x: Value, y: Value, b: Axis, k: Axis, outputs: Axis) -> _Stored:
  """Matrices times matrices."""
  k = in_order(x, k)
  rows = tuple(atom for atom in flat(x.stored) if atom not in (*b, *k))
  x, y = graph.arrange(x, (b, rows, k)), graph.arrange(y, (b, k, outputs))
  return graph.add("MatMul", [x.tensor, y.tensor]), (b, rows, outputs)


def in_order(x: Value, atoms: Axis) -> Axis:
  """Atoms in the order in which they are stored."""
  have = flat(x.stored)
  return tuple(sorted(atoms, key=lambda a: have.index(a) if a in have else len(have)))


def _shared(graph: Graph, x: Value, y: Value, pairs: Any) -> list[Value]:
  """Two values with the same atoms on axes that are one."""
  found = aligned([x, y], pairs) or aligned([graph.plain(x), graph.plain(y)], pairs)
  assert found is not None  # axes of one atom each, of one length
  return found
