"""Emitters of convolutions and matrix products.

A product sums over atoms that both operands share, in any order. So the operand that is computed
keeps the order in which it is stored. The weights are known numbers, and are rearranged to the same
order when the file is made. Shuffled channels and flattened maps end here without any node.
"""

import dataclasses
from typing import Any

import numpy as np

from repjax.errors import InputError
from repjax.onnx.graph import Graph
from repjax.onnx.values import Axes, Axis, Value, aligned, extent, flat, new_axes, renewed

SMALL = 2**20
"""The most numbers in the weights of a grouped product that is written as a convolution. So many
stay in a cache, which matters since a convolution reads them once for each image."""


def convolution(graph: Graph, x: Value, kernel: Value, params: dict[str, Any], shape: Any) -> Value:
  """Emits Conv for `conv_general_dilated`, or ConvTranspose if the input has zeros in between.

  Args:
    graph: graph to add to.
    x: images or maps, stored in any order.
    kernel: weights, stored in any order, known or not.
    params: parameters of the primitive.
    shape: logical shape of the result.

  Raises:
    InputError: the convolution has batch groups; or it is transposed, and has strides, a kernel
      that is computed from the images, or padding that cuts off all pixels.
  """
  if params["batch_group_count"] != 1:
    raise InputError(
      "a convolution with batch_group_count, as the gradient of a grouped one, has no operator in "
      'the ONNX graph. Leave it out, or export the model with format="stablehlo"'
    )
  numbers, groups = params["dimension_numbers"], params["feature_group_count"]
  (batch, channel, *space), (out, into, *taps) = numbers.lhs_spec, numbers.rhs_spec
  if groups == 1:
    x, kernel = _shared(graph, x, kernel, [(channel, into)])
  # Channels stay in the order in which they are stored, and the kernel follows. With groups their
  # order says which group reads them, so that it has to be the logical one.
  inputs = in_order(x, x.axes[channel]) if groups == 1 else x.axes[channel]
  x = graph.arrange(x, (x.axes[batch], inputs, *(x.axes[axis] for axis in space)))
  ordered = (kernel.axes[out], inputs if groups == 1 else kernel.axes[into])
  kernel = graph.arrange(kernel, (*ordered, *(kernel.axes[axis] for axis in taps)))
  emit = _conv if set(params["lhs_dilation"]) == {1} else _conv_transpose
  tensor = emit(graph, x, kernel, params)
  maps = new_axes(shape[axis] for axis in numbers.out_spec[2:])
  stored = (x.stored[0], kernel.stored[0], *maps)
  axes = dict(zip(numbers.out_spec, stored))
  return Value(tensor, tuple(axes[axis] for axis in range(len(axes))), stored)


def _conv(graph: Graph, x: Value, kernel: Value, params: dict[str, Any]) -> str:
  """Emits Conv for maps (N, C, ...) and a kernel (O, C / groups, ...)."""
  pads = params["padding"]
  return graph.add(
    "Conv",
    [cropped(graph, x, pads).tensor, kernel.tensor],
    kernel_shape=[extent(axis) for axis in kernel.stored[2:]],
    strides=list(params["window_strides"]),
    dilations=list(params["rhs_dilation"]),
    pads=[max(pad, 0) for pad in _by_side(pads)],
    group=params["feature_group_count"],
  )


def _conv_transpose(graph: Graph, x: Value, kernel: Value, params: dict[str, Any]) -> str:
  """Emits ConvTranspose for maps (N, C, ...) and a kernel (O, C / groups, ...).

  JAX puts zeros between the pixels, and pads by p. ConvTranspose adds the kernel, turned around, at
  the place of each pixel, and cuts r - p off the sum. Here r is the kernel's reach, dilation times
  (taps - 1). Where r - p is negative, a Pad adds zeros.
  """
  groups, dilations = params["feature_group_count"], params["rhs_dilation"]
  if set(params["window_strides"]) != {1} or not isinstance(kernel.tensor, np.ndarray):
    raise InputError(
      "a transposed convolution that also has strides, or whose kernel is computed from the "
      "images, has no operator in the ONNX graph. Write it as a convolution that puts no zeros "
      'between pixels, or export the model with format="stablehlo"'
    )
  space = tuple(range(2, kernel.array.ndim))
  # (O, C / g, ...) to (C, O / g, ...): the groups move from the outputs to the inputs.
  weight = np.flip(kernel.array, space)
  weight = weight.reshape(groups, -1, *weight.shape[1:]).swapaxes(1, 2)
  weight = weight.reshape(-1, *weight.shape[2:])
  reach = [dilation * (taps - 1) for dilation, taps in zip(dilations, weight.shape[2:])]
  pairs = [(r - low, r - high) for r, (low, high) in zip(reach, params["padding"])]
  steps = zip(x.stored[2:], params["lhs_dilation"], reach)
  sizes = [(extent(axis) - 1) * step + r + 1 for axis, step, r in steps]
  if any(size <= sum(max(cut, 0) for cut in pair) for size, pair in zip(sizes, pairs)):
    raise InputError(
      "a transposed convolution whose padding cuts off all pixels of an axis, and adds zeros in "
      'their place, has no operator in the ONNX graph. Leave it out, or use format="stablehlo"'
    )
  cuts = _by_side(pairs)
  tensor = graph.add(
    "ConvTranspose",
    [x.tensor, weight],
    kernel_shape=list(weight.shape[2:]),
    strides=list(params["lhs_dilation"]),
    dilations=list(dilations),
    pads=[max(cut, 0) for cut in cuts],
    group=groups,
  )
  if min(cuts) >= 0:
    return tensor
  half = len(cuts) // 2
  sides = [[0, 0, *(max(-cut, 0) for cut in part)] for part in (cuts[:half], cuts[half:])]
  return graph.add("Pad", [tensor, np.array(sides, np.int64).ravel()])


def _by_side(pads: Any) -> list[int]:
  """Returns pairs of (low, high) as ONNX has them: all low ones, then all high ones."""
  return [pair[side] for side in (0, 1) for pair in pads]


def cropped(graph: Graph, x: Value, pads: Any) -> Value:
  """Removes the pixels that negative padding takes away, by a Pad, since Conv has no such pads."""
  if min(min(pair) for pair in pads) >= 0:
    return x
  sides = [[0, 0, *(min(pair[side], 0) for pair in pads)] for side in (0, 1)]
  x = graph.derived("Pad", x, np.array(sides, np.int64).ravel())
  sizes = [
    extent(axis) + sum(min(pad, 0) for pad in pair) for axis, pair in zip(x.stored[2:], pads)
  ]
  return dataclasses.replace(x, stored=(*x.stored[:2], *new_axes(sizes)))


def product(graph: Graph, x: Value, y: Value, numbers: Any) -> Value:
  """Emits a 1x1 Conv, a Gemm or a MatMul for `dot_general`, the first of these that can do it.

  Args:
    graph: graph to add to.
    x: (..., K, ...).
    y: (..., K, ...).
    numbers: `dimension_numbers` of the primitive.
  """
  (contracted, other_contracted), (batched, other_batched) = numbers
  pairs = [*zip(contracted, other_contracted), *zip(batched, other_batched)]
  # Renewed atoms keep the free axes of x @ x.T apart. Shared axes then get the same atoms again.
  x, y = _shared(graph, x, renewed(y), pairs)
  k, b = (flat(x.axes[axis] for axis in axes) for axes in (contracted, batched))
  free, other_free = (
    tuple(axis for place, axis in enumerate(value.axes) if place not in taken)
    for value, taken in ((x, (*contracted, *batched)), (y, (*other_contracted, *other_batched)))
  )
  axes = (*(x.axes[axis] for axis in batched), *free, *other_free)
  if x.is_constant:  # weights come second below, whichever side they are on
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
"""A tensor, and the axes that it stores."""


def _pointwise(graph: Graph, x: Value, y: Value, b: Axis, k: Axis, outputs: Axis) -> _Stored | None:
  """Emits a 1x1 convolution over channels of maps, or over groups of few numbers, else None.

  The summed atoms k, with the batched atoms b before them, must be neighbours in the tensor: these
  are its channels. All atoms after them are taken as pixels.
  """
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
  """Emits a Gemm if there is one matrix on each side, else None."""
  if b or not y.is_full:
    return None
  k = in_order(x, k)
  rows = tuple(atom for atom in flat(x.stored) if atom not in k)
  x, y = graph.arrange(x, (rows, k)), graph.arrange(y, (k, outputs))
  return graph.add("Gemm", [x.tensor, y.tensor]), (rows, outputs)


def _matmul(graph: Graph, x: Value, y: Value, b: Axis, k: Axis, outputs: Axis) -> _Stored:
  """Emits a MatMul of batches of matrices."""
  k = in_order(x, k)
  rows = tuple(atom for atom in flat(x.stored) if atom not in (*b, *k))
  x, y = graph.arrange(x, (b, rows, k)), graph.arrange(y, (b, k, outputs))
  return graph.add("MatMul", [x.tensor, y.tensor]), (b, rows, outputs)


def in_order(x: Value, atoms: Axis) -> Axis:
  """Returns atoms in the order in which a value stores them, atoms that it lacks last."""
  have = flat(x.stored)
  return tuple(sorted(atoms, key=lambda a: have.index(a) if a in have else len(have)))


def _shared(graph: Graph, x: Value, y: Value, pairs: Any) -> list[Value]:
  """Returns two values with the same atoms on the axes that belong together."""
  found = aligned([x, y], pairs) or aligned([graph.plain(x), graph.plain(y)], pairs)
  assert found is not None  # plain values have one atom for each axis, of the same length
  return found
