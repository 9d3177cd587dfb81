"""Runs products and borders on arrays, in the layout of their sources."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from repjax.algebra import wide_dtype
from repjax.fusion.cost import Group
from repjax.fusion.expressions import Expression
from repjax.fusion.values import NEW, Border
from repjax.fusion.windows import Window


@dataclasses.dataclass(frozen=True)
class Piece:
  """One product, or one source that is scaled, as part of an instruction.

  Attributes:
    group: the terms that the piece computes.
    batch: axis of the source that a convolution takes as its batch. None for a matrix product.
    kernel: the kernel in the layout that the product takes, or the scale, or None for neither.
    features: number of channels of the result, None if the value has no known channels.
  """

  group: Group
  batch: int | None
  kernel: Expression | None
  features: int | None


def run_piece(piece: Piece, x: Any, kernel: Any) -> Any:
  """Computes a piece in the layout of its source."""
  group = piece.group
  if not group.is_product:
    x = _windowed(x.astype(wide_dtype(x.dtype)), group.windows)
    if kernel is None:
      return x
    shape = [-1 if axis == group.head.channel and kernel.ndim else 1 for axis in range(x.ndim)]
    return x * kernel.reshape(shape).astype(x.dtype)
  x = x.astype(group.head.dtype)
  return _matrix(group, x, kernel) if piece.batch is None else _convolution(piece, x, kernel)


def _windowed(x: Any, windows: Sequence[Window]) -> Any:
  """Pads, cuts and sums neighbours."""
  if all(map(Window.plain, windows, x.shape)):
    return x
  if any(window.taps > 1 for window in windows):
    padding = [window.padding(size) for window, size in zip(windows, x.shape)]
    x = lax.pad(
      x, jnp.zeros((), x.dtype), [(min(low, 0), min(high, 0), 0) for low, high in padding]
    )
    return lax.reduce_window(
      x,
      np.zeros((), x.dtype),
      lax.add,
      [window.taps for window in windows],
      [window.stride for window in windows],
      [(max(low, 0), max(high, 0)) for low, high in padding],
      window_dilation=[window.dilation for window in windows],
    )
  config = [(*window.padding(size), 0) for window, size in zip(windows, x.shape)]
  x = lax.pad(x, jnp.zeros((), x.dtype), config)
  return lax.slice(x, [0] * x.ndim, x.shape, [window.stride for window in windows])


def _matrix(group: Group, x: Any, kernel: Any) -> Any:
  precision, preferred = group.settings
  channel = group.head.channel
  assert channel is not None
  y = lax.dot_general(
    _windowed(x, group.windows),
    kernel,
    (((channel,), (0,)), ((), ())),
    precision=precision,
    preferred_element_type=preferred,
  )
  return jnp.moveaxis(y, -1, channel)


def _convolution(piece: Piece, x: Any, kernel: Any) -> Any:
  group, batch, channel = piece.group, piece.batch, piece.group.head.channel
  assert batch is not None
  assert channel is not None
  windows, precision = group.windows, group.settings
  spatial = [axis for axis in range(x.ndim) if axis not in (batch, channel)]
  moved = [windows[axis] for axis in spatial]
  padding = [window.padding(x.shape[axis]) for axis, window in zip(spatial, moved)]
  layout = (batch, channel, *spatial)
  if batch == NEW:
    x, layout = x[None], (0, channel + 1, *(axis + 1 for axis in spatial))
  count = len(spatial)
  y = lax.conv_general_dilated(
    x,
    kernel,
    window_strides=[window.stride for window in moved],
    padding=padding,
    lhs_dilation=[window.spread for window in moved],
    rhs_dilation=[window.dilation for window in moved],
    dimension_numbers=lax.ConvDimensionNumbers(layout, (count + 1, count, *range(count)), layout),
    feature_group_count=group.groups,
    precision=precision[0],
    preferred_element_type=precision[1],
  )
  return y[0] if batch == NEW else y


def moved(piece: Piece, y: Any, shape: tuple[int, ...]) -> Any:
  """Moves the axes of the source to their places in the value."""
  order = [axis for axis in piece.group.head.view if axis is not None]
  order += [axis for axis in range(y.ndim) if axis not in order]  # axes of length 1
  return (y if order == sorted(order) else y.transpose(order)).reshape(shape)


def border_map(border: Border, kernel: Any, channel: int | None) -> Any:
  """Returns the map that a shift becomes after a padded convolution, the same for all images."""
  y = kernel
  place = 0
  for axis, moved in enumerate(border.windows):
    if axis == channel:
      continue
    if moved is not None:
      inside = jnp.asarray(_inside(*moved), y.dtype)  # (outputs, taps)
      y = jnp.tensordot(inside, y, (1, place), precision=lax.Precision.HIGHEST)
      y = jnp.moveaxis(y, 0, place)
    place += 1
  return jnp.moveaxis(y, -1, channel if channel is not None else -1)


def _inside(window: Window, inputs: int) -> np.ndarray:
  """Returns which taps of each output read an input. One row stands for all where all do."""
  at = np.arange(window.size)[:, None] * window.stride - window.low
  at = at + np.arange(window.taps) * window.dilation
  inside = (at >= 0) & (at <= (inputs - 1) * window.spread) & (at % window.spread == 0)
  return inside[:1] if inside.all() else inside
