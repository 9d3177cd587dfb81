"""Writes a sum of terms as one instruction of the fused program.

The convolution runs in the layout of its source, and its result is moved to the layout of the
value. Everything around products is computed in float32 or wider, and rounded once at the end.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from repjax.algebra import wide_dtype
from repjax.fusion import kernels
from repjax.fusion.cost import Group
from repjax.fusion.counts import Counts
from repjax.fusion.execution import Piece, border_map, moved, run_piece
from repjax.fusion.expressions import Expression, derived
from repjax.fusion.values import NEW, Affine, Border, Node
from repjax.fusion.vectors import plus
from repjax.fusion.windows import Window


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
  def stored(self) -> list[Expression]:
    """The kernels and vectors that the instruction reads, in its order."""
    kept = [piece.kernel for piece in self.pieces] + [self.bias]
    kept += [border.kernel for border in self.borders]
    return [each for each in kept if each is not None]

  @property
  def kinds(self) -> list[str]:
    """The kind of each stored array."""
    named = [piece for piece in self.pieces if piece.kernel is not None]
    kinds = ["kernel" if piece.group.is_product else "scale" for piece in named]
    return [*kinds, *(["bias"] if self.bias else []), *("border" for _ in self.borders)]

  @property
  def parts(self) -> list[str]:
    """The branches that are merged, a chain of steps for each term."""
    return [" > ".join(term.names) for piece in self.pieces for term in piece.group.members]

  @property
  def counts(self) -> Counts:
    """The cost of the instruction."""
    products = [piece for piece in self.pieces if piece.group.is_product]
    work = 0
    for piece in products:
      assert piece.kernel is not None
      assert piece.features is not None
      work += math.prod(self.part(piece)) * piece.kernel.size // piece.features
    return Counts(len(products), work, sum(each.size for each in self.stored))

  @property
  def operations(self) -> int:
    """The number of equations that the instruction stands for."""
    starts = {piece.group.head.start for piece in self.pieces}
    count = sum(_operations(piece) for piece in self.pieces)
    # Pieces at one channel are added up, and all are concatenated at once.
    count += len(self.pieces) - len(starts) + (len(starts) > 1)
    return count + (self.bias is not None) + len(self.borders)

  def run(self, *values: Any) -> list[Any]:
    """Computes the result from the sources and the stored arrays."""
    count, wide = len(self.pieces), wide_dtype(self.dtype)
    rest = iter(values[count:])
    parts: dict[int, Any] = {}
    for piece, x in zip(self.pieces, values[:count]):
      y = run_piece(piece, x, None if piece.kernel is None else next(rest))
      y = moved(piece, y, self.part(piece)).astype(wide)
      start = piece.group.head.start
      parts[start] = parts[start] + y if start in parts else y
    ordered = [part for _, part in sorted(parts.items())]
    y = ordered[0] if len(ordered) == 1 else jnp.concatenate(ordered, self.channel)
    if self.bias is not None:
      y = y + self._along_channel(next(rest).astype(wide))
    for border in self.borders:
      y = y + border_map(border, next(rest), self.channel).astype(wide)
    return [y.astype(self.dtype)]

  def part(self, piece: Piece) -> tuple[int, ...]:
    """Returns the shape of a piece's channels of the result."""
    if self.channel is None or piece.features is None:
      return self.shape
    return (*self.shape[: self.channel], piece.features, *self.shape[self.channel + 1 :])

  def _along_channel(self, vector: Any) -> Any:
    """Returns a vector with as many axes as the result."""
    shape = [1] * len(self.shape)
    if vector.ndim:
      assert self.channel is not None
      shape[self.channel] = -1
    return vector.reshape(shape)


def merge_of(affine: Affine, groups: Sequence[Group], dtype: Any, table: Any) -> Merge:
  """Returns the instruction that computes a sum, whose terms are grouped into products."""
  pieces = tuple(_piece(group, table) for group in groups)
  bias = affine.bias
  borders: dict[Any, Border] = {}
  for border in affine.borders:
    before = borders.get(border.windows)
    kernel = border.kernel if before is None else plus(before.kernel, border.kernel)
    borders[border.windows] = Border(kernel, border.windows)
  return Merge(affine.shape, dtype, affine.channel, pieces, bias, tuple(borders.values()))


def _piece(group: Group, table: Any) -> Piece:
  head = group.head
  if not group.is_product:
    return Piece(group, None, _joint_scale(group, table), head.features)
  total = joint_kernel(group, table)
  batch = _batch_of(group)
  kernel = derived(_as_operand, total, layout=_layout(group, batch), dtype=head.dtype)
  return Piece(group, batch, kernel, head.features)


def joint_kernel(group: Group, table: Any) -> Expression:
  """Returns the sum of the kernels of all terms of a product, each in its place."""
  others = [group.windows[axis] for axis in group.head.others]
  total = None
  for term in group.members:
    own = [term.windows[axis] for axis in term.others]
    kernel = kernels.embedded(kernels.kernel_of(term, group.groups, table), own, others)
    total = plus(total, kernel)
  assert total is not None
  return total


def _joint_scale(group: Group, table: Any) -> Expression | None:
  """Returns the sum of all scales of a source that is no product."""
  if len(group.members) == 1:
    return group.head.scale
  one = table.constant(np.ones((), wide_dtype(group.head.dtype)))
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
    hidden = [axis for axis in plain if head.source.shape[axis] == 1]
    return next((axis for axis in [*named, *hidden] if axis in plain), NEW)
  if all(group.windows[axis].taps == 1 for axis in head.others) and group.groups == 1:
    return None
  return plain[0] if plain else NEW


def _layout(group: Group, batch: int | None) -> str:
  """Returns how the kernel's axes of taps change: the batch's own is dropped, or all of them."""
  if batch is None:
    return "matrix"
  return "whole" if batch == NEW else f"without {group.head.others.index(batch)}"


def _as_operand(kernel: Any, layout: str, dtype: Any) -> Any:
  kernel = kernel.astype(dtype)
  if layout == "matrix":
    return kernel.reshape(kernel.shape[-2:])
  return kernel if layout == "whole" else jnp.squeeze(kernel, int(layout.split()[1]))


def _operations(piece: Piece) -> int:
  group = piece.group
  plain = all(map(Window.plain, group.windows, group.head.source.shape))
  if group.is_product:
    return 1 + (piece.batch is None and not plain)
  return (piece.kernel is not None) + (not plain)
