"""Kernels and vectors as expressions: the algebra of `repjax.algebra` on values that come later.

All kernels are (taps of all axes of the source besides the channels, I/g, O). The axis of the batch
counts as an axis with one tap. Everything is computed in float32 or wider.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from repjax import algebra
from repjax.fusion.expressions import Expression, later
from repjax.fusion.windows import Window

inverse = later(jnp.reciprocal)
opposite = later(jnp.negative)
_merge_groups = later(algebra.merge_groups)
_chain_kernels = later(algebra.chain_kernels)


def widened(value: Expression) -> Expression:
  """Returns the value in float32, or float64 if it is in float64."""
  wide = algebra.wide_dtype(value.dtype)
  return value if value.dtype == wide else cast(value, dtype=wide)


@later
def cast(array: Any, *, dtype: Any) -> Any:
  """Returns an array in a dtype."""
  return array.astype(dtype)


@later
def times(first: Any, second: Any) -> Any:
  """Returns a product of two arrays in their wider dtype. Trailing axes are matched."""
  first, second = _matched(first, second)
  return first * second


def plus(value: Expression | None, vector: Expression | None) -> Expression | None:
  """Returns a sum of two values in their wider dtype. None is zero."""
  return value if vector is None else vector if value is None else _plus(value, vector)


@later
def _plus(first: Any, second: Any) -> Any:
  first, second = _matched(first, second)
  return first + second


def _matched(first: Any, second: Any) -> tuple[Any, Any]:
  """Returns two arrays of one dtype and of the same number of axes."""
  dtype, rank = algebra.wide_dtype(first.dtype, second.dtype), max(first.ndim, second.ndim)
  first, second = (
    each.astype(dtype).reshape((1,) * (rank - each.ndim) + each.shape) for each in (first, second)
  )
  return first, second


@later
def arranged(
  array: Any,
  *,
  order: tuple[int, ...],
  shape: tuple[int, ...] | None = None,
  wide: tuple[int, ...] | None = None,
  into: tuple[int, ...] | None = None,
) -> Any:
  """Returns an array that is reshaped, transposed, broadcast and reshaped again.

  Args:
    array: to be arranged.
    order: of the axes.
    shape: before the transposition, None for the shape of the array.
    wide: after the transposition, None for no broadcast.
    into: of the result, None for no reshape.
  """
  array = (array if shape is None else array.reshape(shape)).transpose(order)
  array = array if wide is None else jnp.broadcast_to(array, wide)
  return array if into is None else array.reshape(into)


def rearranged(kernel: Expression, order: Sequence[int], taps: Sequence[int]) -> Expression:
  """Returns a kernel or a map of taps with its axes of taps in a new order, then reshaped.

  Args:
    kernel: (taps, ...).
    order: the axes of taps in their new order.
    taps: number of taps of each axis of the result. Axes with one tap may come and go.
  """
  rest = range(len(order), len(kernel.shape))
  into = (*taps, *kernel.shape[len(order) :])
  return arranged(kernel, order=(*order, *rest), into=into)


def at_channels(value: Expression, start: int, features: int, length: int) -> Expression:
  """Returns a value of some channels, (..., features) or (), as one of all channels.

  Channels before `start` and after `start + features` are zero.
  """
  if features == length:
    return value
  return _at_channels(value, start=start, features=features, length=length)


@later
def _at_channels(value: Any, *, start: int, features: int, length: int) -> Any:
  value = jnp.broadcast_to(value, (*value.shape[:-1], features))
  config = [(0, 0)] * (value.ndim - 1) + [(start, length - start - features)]
  return jnp.pad(value, config)


@later
def channels(value: Any, *, start: int, stop: int) -> Any:
  """Returns a range of the channels of a vector or kernel, all of a number ()."""
  return value[..., start:stop] if value.ndim else value


@later
def input_rows(kernel: Any, *, start: int, stop: int) -> Any:
  """Returns the part of an ungrouped kernel that reads a range of channels."""
  return kernel[..., start:stop, :]


def regrouped(kernel: Expression, groups: int, fewer: int) -> Expression:
  """Returns the kernel of the same convolution in fewer groups."""
  return kernel if groups == fewer else _merge_groups(kernel, groups=groups, fewer=fewer)


@later
def diagonal(scale: Any, *, taps: tuple[int, ...], features: int) -> Any:
  """Returns the depthwise kernel that multiplies by a scale, (C,) or (), at every tap."""
  return jnp.broadcast_to(scale, (*taps, 1, features))


def embedded(kernel: Expression, windows: Sequence[tuple[Window, Window]]) -> Expression:
  """Returns the kernel on the grid of larger windows, from both windows of each axis with taps."""
  places = tuple(window.place_in(larger) for window, larger in windows)
  return _padded(kernel, places=places) if any(map(any, places)) else kernel


@later
def _padded(kernel: Any, *, places: tuple[tuple[int, int, int], ...]) -> Any:
  kernel = algebra.dilate_kernel(kernel, tuple(between + 1 for *_, between in places))
  config = [*((before, after, 0) for before, after, _ in places), (0, 0, 0), (0, 0, 0)]
  return lax.pad(kernel, jnp.zeros((), kernel.dtype), config)


@later
def input_scaled(kernel: Any, vector: Any, *, groups: int) -> Any:
  """Returns the kernel of the convolution after a scale of its inputs, a vector (I,) or ()."""
  inputs, outputs = kernel.shape[-2:]
  if vector.ndim:
    vector = vector.reshape(groups, inputs).T  # (I/g, g)
    vector = jnp.repeat(vector, outputs // groups, axis=1)  # (I/g, O)
  kernel, vector = _matched(kernel, vector)
  return kernel * vector


@later
def shift_by_tap(kernel: Any) -> Any:
  """Returns what the inputs add through each tap, (taps, O), where all inputs are 1."""
  return kernel.sum(-2)


@later
def summed_taps(shift: Any) -> Any:
  """Returns the sum over all taps of (taps, O)."""
  return shift.reshape(-1, shift.shape[-1]).sum(0)


@later
def summed_along(shift: Any, *, axes: tuple[int, ...]) -> Any:
  """Returns (taps, O) with one tap along some axes, the sum of those that were there."""
  return shift.sum(axes, keepdims=True)


def chained(
  first: Expression,
  second: Expression,
  groups: int,
  windows: Sequence[tuple[Window, Window, Window]],
) -> Expression:
  """Returns the kernel of two convolutions, one after the other, in a number of groups.

  Args:
    first: (taps, I/g, M).
    second: (taps, M/g, O).
    groups: number of groups of both.
    windows: of the first kernel, of the second and of the result, for each axis with taps.
  """
  # The step of a lone tap means nothing, but must not be 0.
  return _chain_kernels(
    *(first, second),
    groups=groups,
    first_steps=tuple(max(one.dilation // whole.dilation, 1) for one, _, whole in windows),
    second_steps=tuple(
      max(two.dilation * one.stride // whole.dilation, 1) for one, two, whole in windows
    ),
  )


@later
def pointwise_map(border: Any, kernel: Any) -> Any:
  """Returns a border's kernel (taps, M) after a pointwise convolution (1..., M, O): (taps, O)."""
  matrix = kernel.reshape(border.shape[-1], -1)
  dtype = algebra.wide_dtype(border.dtype, matrix.dtype)
  border, matrix = border.astype(dtype), matrix.astype(dtype)
  return jnp.einsum("...i,io->...o", border, matrix, precision=lax.Precision.HIGHEST)


@later
def over_tile(
  kernel: Any, *, taps: tuple[int, int], tile: tuple[int, int], groups: tuple[int, int]
) -> Any:
  """Returns the weights of a convolution over a tile, as `algebra.conv_to_dense` orders them.

  Args:
    kernel: of the convolution.
    taps: height and width of the kernel.
    tile: height and width in pixels.
    groups: numbers of groups of the convolution and of the result.
  """
  kernel = algebra.merge_groups(kernel, *groups).reshape(*taps, -1, kernel.shape[-1])
  bias = jnp.zeros(kernel.shape[-1], kernel.dtype)
  return algebra.conv_to_dense(algebra.ConvParams(kernel, bias), tile, groups[1])[0]
