"""The instruction that computes a sum of terms, and how it runs on arrays.

Each product runs in the layout of its source, and its result is moved to the layout of the value.
Everything around products is computed in float32 or wider, and rounded once at the end.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from repjax.algebra import wide_dtype
from repjax.fusion.choice import Group
from repjax.fusion.expressions import Expression, later
from repjax.fusion.kernels import plus
from repjax.fusion.report import Counts
from repjax.fusion.values import NEW, Affine, Border, Node
from repjax.fusion.windows import Window


@dataclasses.dataclass(frozen=True)
class Piece:
  """One product, or one source that is scaled, as part of an instruction.

  Attributes:
    group: the terms that the piece computes.
    batch: axis of the source that a convolution takes as its batch. None for a matrix product.
    kernel: the kernel in the layout that the product takes, or the scale, or None for neither.
  """

  group: Group
  batch: int | None
  kernel: Expression | None

  @property
  def operations(self) -> int:
    """The number of equations that the piece stands for."""
    plain = all(map(Window.plain, self.group.windows, self.group.head.source.shape))
    if self.group.is_product:
      return 1 + (self.batch is None and not plain)
    return (self.kernel is not None) + (not plain)

  def run(self, x: Any, kernel: Any) -> Any:
    """Computes the piece in the layout of its source."""
    group, channel = self.group, self.group.head.channel
    if group.is_product:
      x = x.astype(group.head.dtype)
      return _matrix(group, x, kernel) if self.batch is None else self._convolution(x, kernel)
    x = _windowed(x.astype(wide_dtype(x.dtype)), group.windows)
    if kernel is None:
      return x
    shape = [-1 if axis == channel and kernel.ndim else 1 for axis in range(x.ndim)]
    return x * kernel.reshape(shape).astype(x.dtype)

  def _convolution(self, x: Any, kernel: Any) -> Any:
    group, batch, channel = self.group, self.batch, self.group.head.channel
    assert batch is not None
    assert channel is not None
    spatial = [axis for axis in range(x.ndim) if axis not in (batch, channel)]
    windows = [group.windows[axis] for axis in spatial]
    padding = [window.padding(x.shape[axis]) for axis, window in zip(spatial, windows)]
    layout = (batch, channel, *spatial)
    if batch == NEW:
      x, layout = x[None], (0, channel + 1, *(axis + 1 for axis in spatial))
    count = len(spatial)
    y = lax.conv_general_dilated(
      x,
      kernel,
      window_strides=[window.stride for window in windows],
      padding=padding,
      lhs_dilation=[window.spread for window in windows],
      rhs_dilation=[window.dilation for window in windows],
      dimension_numbers=lax.ConvDimensionNumbers(layout, (count + 1, count, *range(count)), layout),
      feature_group_count=group.groups,
      precision=group.settings[0],
      preferred_element_type=group.settings[1],
    )
    return y[0] if batch == NEW else y

  def moved(self, y: Any, shape: tuple[int, ...]) -> Any:
    """Moves the axes of the source to their places in the value."""
    order = [axis for axis in self.group.head.view if axis is not None]
    order += [axis for axis in range(y.ndim) if axis not in order]  # axes of length 1
    return (y if order == sorted(order) else y.transpose(order)).reshape(shape)


def _windowed(x: Any, windows: Sequence[Window]) -> Any:
  """Pads, cuts and sums neighbours."""
  if all(map(Window.plain, windows, x.shape)):
    return x
  padding = [window.padding(size) for window, size in zip(windows, x.shape)]
  strides, zero = [window.stride for window in windows], np.zeros((), x.dtype)
  if all(window.taps == 1 for window in windows):
    x = lax.pad(x, zero, [(low, high, 0) for low, high in padding])
    return lax.slice(x, [0] * x.ndim, x.shape, strides)
  if any(min(each) < 0 for each in padding):  # `reduce_window` does not cut
    x = lax.pad(x, zero, [(low, high, 0) for low, high in padding])
    padding = [(0, 0)] * x.ndim
  return lax.reduce_window(
    x,
    zero,
    lax.add,
    [window.taps for window in windows],
    strides,
    padding,
    window_dilation=[window.dilation for window in windows],
  )


def _matrix(group: Group, x: Any, kernel: Any) -> Any:
  """Computes a product with a matrix (I, O), or with one for each group (g, I/g, O/g)."""
  channel, (precision, preferred) = group.head.channel, group.settings
  assert channel is not None
  x, batch = _windowed(x, group.windows), ()
  if group.groups > 1:
    x = x.reshape(*x.shape[:channel], group.groups, -1, *x.shape[channel + 1 :])
    batch, channel = (channel,), channel + 1
  numbers = ((channel,), (len(batch),)), (batch, tuple(range(len(batch))))
  y = lax.dot_general(x, kernel, numbers, precision=precision, preferred_element_type=preferred)
  if batch:  # (g, ..., O/g) becomes (..., g, O/g)
    y = jnp.moveaxis(y, 0, -2)
    y, channel = y.reshape(*y.shape[:-2], -1), batch[0]
  return jnp.moveaxis(y, -1, channel)


def border_map(border: Border, kernel: Any, channel: int | None) -> Any:
  """Returns the map that a shift becomes after a padded convolution, the same for all images."""
  y, place = kernel, 0
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


@dataclasses.dataclass(frozen=True)
class Merge:
  """An instruction that computes a sum of pieces, a bias and borders.

  Attributes:
    shape, dtype: of the result.
    channel: the axis of the result that holds the channels.
    pieces: what is added up, or concatenated where pieces start at different channels.
    bias: (C,) or (), None for 0.
    borders: shifts that differ at the border of the map.
  """

  shape: tuple[int, ...]
  dtype: Any
  channel: int | None
  pieces: tuple[Piece, ...]
  bias: Expression | None
  borders: tuple[Border, ...]

  @property
  def sources(self) -> list[Node]:
    """The nodes that the pieces read."""
    return [piece.group.head.source for piece in self.pieces]

  @property
  def stored(self) -> dict[Expression, str]:
    """The kernels and vectors that the instruction reads, in its order, with their kinds."""
    kept = [(each.kernel, "kernel" if each.group.is_product else "scale") for each in self.pieces]
    kept += [(self.bias, "bias"), *((border.kernel, "border") for border in self.borders)]
    return {each: kind for each, kind in kept if each is not None}

  @property
  def parts(self) -> list[str]:
    """The branches that are merged, a chain of steps for each term.

    An identity of the same source is part of the kernel. A "shortcut" is a different source, which
    stays an addition.
    """
    names = [
      "shortcut" if beside and term.names == ("identity",) else " > ".join(term.names)
      for piece, beside in zip(self.pieces, self._beside)
      for term in piece.group.members
    ]
    # One source that nothing is added to: only its numbers are scaled and shifted.
    return ["scale and shift"] if names == ["identity"] else names

  @property
  def _beside(self) -> list[bool]:
    """Tells for each piece if it is no product and is added to one, as the input of a block is."""
    products = {piece.group.head.start for piece in self.pieces if piece.group.is_product}
    return [
      not piece.group.is_product and piece.group.head.start in products for piece in self.pieces
    ]

  @property
  def counts(self) -> Counts:
    """The cost of the instruction."""
    work = [
      math.prod(self.part(each)) * each.kernel.size // (each.group.head.features or 1)
      for each in self.pieces
      if each.group.is_product and each.kernel is not None
    ]
    # Constants are no parameters.
    return Counts(len(work), sum(work), sum(each.size for each in self.stored if each.leaves))

  @property
  def operations(self) -> int:
    """The number of equations that the instruction stands for."""
    starts = {piece.group.head.start for piece in self.pieces}
    count = sum(piece.operations for piece in self.pieces)
    # Pieces at one channel are added up, and all are concatenated at once.
    count += len(self.pieces) - len(starts) + (len(starts) > 1)
    return count + (self.bias is not None) + len(self.borders)

  def run(self, *values: Any) -> list[Any]:
    """Computes the result from the sources and the stored arrays."""
    count, wide = len(self.pieces), wide_dtype(self.dtype)
    held = dict(zip(self.stored, values[count:]))
    bias, parts = None, {}
    if self.bias is not None:
      vector = held[self.bias].astype(wide)
      axes = range(len(self.shape))
      bias = vector.reshape([-1 if axis == self.channel and vector.ndim else 1 for axis in axes])
    alone = len({piece.group.head.start for piece in self.pieces}) == 1
    for piece, x in zip(self.pieces, values[:count]):
      y = piece.run(x, None if piece.kernel is None else held[piece.kernel])
      y = piece.moved(y, self.part(piece)).astype(wide)
      if bias is not None and alone and piece.group.is_product:
        # Runtimes have convolutions with a bias, and then add a shortcut.
        y, bias = y + bias, None
      start = piece.group.head.start
      parts[start] = parts[start] + y if start in parts else y
    ordered = [part for _, part in sorted(parts.items())]
    y = ordered[0] if len(ordered) == 1 else jnp.concatenate(ordered, self.channel)
    if bias is not None:
      y = y + bias
    for border in self.borders:
      y = y + border_map(border, held[border.kernel], self.channel).astype(wide)
    return [y.astype(self.dtype)]

  def part(self, piece: Piece) -> tuple[int, ...]:
    """Returns the shape of a piece's channels of the result."""
    features = piece.group.head.features
    if self.channel is None or features is None:
      return self.shape
    return (*self.shape[: self.channel], features, *self.shape[self.channel + 1 :])


def merge_of(affine: Affine, groups: Sequence[Group], dtype: Any) -> Merge:
  """Returns the instruction that computes a sum, whose terms are grouped into products."""
  borders: dict[Any, Expression | None] = {}
  for border in affine.borders:
    borders[border.windows] = plus(borders.get(border.windows), border.kernel)
  kept = tuple(Border(each, windows) for windows, each in borders.items() if each is not None)
  return Merge(affine.shape, dtype, affine.channel, tuple(map(_piece, groups)), affine.bias, kept)


def _piece(group: Group) -> Piece:
  head = group.head
  if not group.is_product:
    return Piece(group, None, _joint_scale(group))
  batch = _batch_of(group)
  place = None if batch in (None, NEW) else head.others.index(batch)
  groups = group.groups if batch is None else None
  kernel = _as_operand(group.kernel, batch=place, groups=groups, dtype=head.dtype)
  return Piece(group, batch, kernel)


def _joint_scale(group: Group) -> Expression | None:
  """Returns the sum of all scales of a source that is no product."""
  if len(group.members) == 1:
    return group.head.scale
  one = group.head.source.table.constant(np.ones((), wide_dtype(group.head.dtype)))
  total = None
  for term in group.members:
    total = plus(total, term.scale or one)
  return total


def _batch_of(group: Group) -> int | None:
  """Returns the axis that a convolution takes as its batch, None for a matrix product."""
  head = group.head
  named = [term.batch for term in group.members if term.batch is not None]
  plain = [axis for axis in head.others if group.windows[axis].plain(head.source.shape[axis])]
  if named:
    # At batch 1 a reshape may have hidden the batch, which is then a plain axis of length 1.
    unit = [axis for axis in plain if head.source.shape[axis] == 1]
    return next((axis for axis in [*named, *unit] if axis in plain), NEW)
  if all(group.windows[axis].taps == 1 for axis in head.others):
    return None
  return plain[0] if plain else NEW


@later
def _as_operand(kernel: Any, *, batch: int | None, groups: int | None, dtype: Any) -> Any:
  """Returns a kernel without the axis of the batch, or as one matrix for each group."""
  kernel = kernel.astype(dtype)
  if groups is None:
    return kernel if batch is None else jnp.squeeze(kernel, batch)
  matrix = kernel.reshape(kernel.shape[-2:])
  if groups == 1:
    return matrix
  return jnp.moveaxis(matrix.reshape(matrix.shape[0], groups, -1), 1, 0)  # (g, I/g, O/g)
