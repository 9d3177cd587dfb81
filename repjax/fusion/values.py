"""Values of a traced program that depend on the arguments, as sums of convolutions.

A node stands for one value of the program. Where arithmetic on a node is affine, nothing is
computed: the next node holds an `Affine`, a sum of terms over earlier nodes, with a shift.

  y = conv(x) * scale + bias + x      becomes      Term(x, kernel * scale) + Term(x) + bias

Each term is one convolution of its source. A term without a kernel is the source itself, scaled.
Axes may lie in a different order in the value than in the source; `Term.view` says how.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from repjax.fusion.expressions import Expression, derived
from repjax.fusion.vectors import plus, times, widened
from repjax.fusion.windows import Window
from repjax.program import Equation, Variable


class Refusal(Exception):  # noqa: N818 - nothing went wrong
  """The reason why something is not merged, in words for the report."""


@dataclasses.dataclass(eq=False)
class Node:
  """A value of the program that depends on the arguments.

  Attributes:
    variable: the variable of the program.
    equation: the equation that makes the value, None for an argument.
    affine: the value as a sum of terms, None if the value is opaque.
    reads: number of equations and outputs that read the value.
    computed: the plan has an instruction that makes the value.
    layout: the value as moved numbers of an earlier node, for products over several axes.
    product: the value as a product over several axes, which is not computed yet.
    pick: the node and the instruction of a value that is no value of the program.
    chain: the equations before `equation` that the program picks pixels with.
  """

  variable: Variable
  equation: Equation | None = None
  affine: "Affine | None" = None
  reads: int = 1
  computed: bool = False
  layout: Any = None
  product: Any = None
  pick: Any = None
  chain: tuple[Equation, ...] = ()

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the value."""
    return tuple(self.variable.aval.shape)

  @property
  def dtype(self) -> Any:
    """The dtype of the value."""
    return jnp.dtype(self.variable.aval.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Term:
  """A convolution of a node; without a kernel the node itself, or sums of its neighbours.

  Attributes:
    source: the node that is read.
    view: for each axis of the value the axis of the source, None for a new axis of length 1.
    windows: for each axis of the source how it is read.
    channel: the axis of the source that holds the channels, None if not known yet.
    dtype: the dtype that the program computes the term in.
    kernel: (taps of all other axes of the source, I/g, O), or None.
    scale: (C,) or (), None for 1. Only without a kernel.
    groups: number of groups of the convolution.
    batch: the axis of the source that a convolution takes as its batch. NEW for a new axis. None
      for a matrix product.
    settings: precision and preferred dtype of the product.
    names: what the term is made of, for the report.
    start: the first channel of the value that the term adds to. Concatenation makes it differ
      from 0.
  """

  source: Node
  view: tuple[int | None, ...]
  windows: tuple[Window, ...]
  channel: int | None
  dtype: Any
  kernel: Expression | None = None
  scale: Expression | None = None
  groups: int = 1
  batch: int | None = None
  settings: tuple[Any, ...] = ()
  names: tuple[str, ...] = ()
  start: int = 0

  @property
  def others(self) -> list[int]:
    """The axes of the source besides the channels."""
    return [axis for axis in range(len(self.windows)) if axis != self.channel]

  @property
  def taps(self) -> tuple[int, ...]:
    """The number of taps along all axes of the source besides the channels."""
    return tuple(self.windows[axis].taps for axis in self.others)

  @property
  def sums(self) -> bool:
    """Tells if the term sums neighbours without a kernel, as a pool does."""
    return self.kernel is None and any(window.taps > 1 for window in self.windows)

  @property
  def features(self) -> int | None:
    """The number of channels that the term adds to, None if not known yet."""
    if self.kernel is not None:
      return self.kernel.shape[-1]
    return None if self.channel is None else self.source.shape[self.channel]


NEW = -1
"""`Term.batch` where the batch axis has length 1 and the source does not have it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Border:
  """A shift after a padded convolution, as the convolution of a map of ones.

  Attributes:
    kernel: (taps of all axes of the value besides the channels, O).
    windows: for each axis of the value its window and the number of inputs, None for an axis that
      no window moves along.
  """

  kernel: Expression
  windows: tuple[tuple[Window, int] | None, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
  """A sum of terms, a shift and borders.

  Attributes:
    shape: shape of the value.
    terms: what is added up.
    bias: (C,) or (), None for 0.
    borders: shifts that differ at the border of the map.
    channel: the axis of the value that holds the channels, None if not known yet.
    equations: the equations of the program that the sum replaces.
  """

  shape: tuple[int, ...]
  terms: tuple[Term, ...]
  bias: Expression | None = None
  borders: tuple[Border, ...] = ()
  channel: int | None = None
  equations: frozenset[Equation] = frozenset()

  @property
  def linear(self) -> bool:
    """Tells if the sum is one term without a kernel: its source, moved, scaled and shifted."""
    return len(self.terms) == 1 and self.terms[0].kernel is None and not self.terms[0].sums

  @property
  def is_view(self) -> bool:
    """Tells if the sum is one term that only moves, pads or cuts the source."""
    return self.linear and self.terms[0].scale is None and self.bias is None and not self.borders


def affine_of(node: Node) -> Affine:
  """Returns a node as a sum of terms. A node that is computed is the identity of itself."""
  return identity(node) if node.affine is None else node.affine


def identity(node: Node) -> Affine:
  """Returns the sum whose only term is the node itself."""
  windows = tuple(map(Window, node.shape))
  term = Term(node, tuple(range(len(windows))), windows, None, node.dtype, names=("identity",))
  return Affine(node.shape, (term,))


def with_channel(affine: Affine, axis: int | None) -> Affine:
  """Returns the same sum with an axis of the value as its channels, None for any axis.

  Raises:
    Refusal: the channels lie along a different axis already, or are padded, cut or new.
  """
  if axis is None or affine.channel == axis:
    return affine
  if affine.channel is not None:
    raise Refusal("a vector along a different axis than the channels")
  terms = []
  for term in affine.terms:
    place = term.view[axis]
    if place is None or not term.windows[place].plain(term.source.shape[place]):
      raise Refusal("channels that are padded, cut or of length 1")
    terms.append(dataclasses.replace(term, channel=place))
  return dataclasses.replace(affine, terms=tuple(terms), channel=axis)


def scaled(affine: Affine, scale: Expression) -> Affine:
  """Returns the sum times a number () or a vector (C,)."""
  scale = widened(scale)
  terms = tuple(scaled_term(term, part_of(scale, term)) for term in affine.terms)
  bias = None if affine.bias is None else times(affine.bias, scale)
  borders = tuple(
    dataclasses.replace(border, kernel=times(border.kernel, scale)) for border in affine.borders
  )
  return dataclasses.replace(affine, terms=terms, bias=bias, borders=borders)


def scaled_term(term: Term, scale: Expression) -> Term:
  """Returns a term times a number () or a vector of the term's channels."""
  if term.kernel is not None:
    return dataclasses.replace(term, kernel=times(widened(term.kernel), scale))
  return dataclasses.replace(term, scale=times(term.scale, scale) if term.scale else scale)


def part_of(vector: Expression, term: Term) -> Expression:
  """Returns the part of a vector of all channels that belongs to a term's channels."""
  if not vector.shape or term.features in (None, vector.shape[0]):
    return vector
  assert term.features is not None
  return derived(_cut, vector, start=term.start, stop=term.start + term.features)


def shifted(affine: Affine, shift: Expression) -> Affine:
  """Returns the sum plus a number () or a vector (C,)."""
  return dataclasses.replace(affine, bias=plus(affine.bias, widened(shift)))


def added(first: Affine, second: Affine) -> Affine:
  """Returns the sum of two sums of one shape.

  Raises:
    Refusal: their channels lie along different axes, or differ in how they are concatenated.
  """
  channel = second.channel if first.channel is None else first.channel
  first, second = with_channel(first, channel), with_channel(second, channel)
  if segments(first) != segments(second):
    raise Refusal("a sum with channels that are concatenated")
  return dataclasses.replace(
    first,
    terms=first.terms + second.terms,
    bias=second.bias if first.bias is None else plus(second.bias, first.bias),
    borders=first.borders + second.borders,
    equations=first.equations | second.equations,
  )


def segments(affine: Affine) -> set[tuple[int, int | None]]:
  """Returns the ranges of channels that the terms add to, as first channel and number."""
  return {(term.start, term.features) for term in affine.terms}


def _cut(vector: Any, start: int, stop: int) -> Any:
  return vector[start:stop]
