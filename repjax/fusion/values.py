"""Values of a traced program that depend on the arguments, as sums of convolutions.

A node stands for one value of the program. Where arithmetic on a node is affine, nothing is
computed: the next node holds an `Affine`, a sum of terms over earlier nodes, with a shift.

  y = conv(x) * scale + bias + x      becomes      Term(x, kernel * scale) + Term(x) + bias

Each term is one convolution of its source. A term without a kernel is the source itself, scaled.
Axes may lie in a different order in the value than in the source; `Term.view` says how.

A hidden node is a value that the program does not have, such as the matrix that a reshape and a
transposition would make of a value. A hidden node is computed only if that is a gain.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repjax.algebra import wide_dtype
from repjax.fusion import kernels
from repjax.fusion.expressions import Expression, Expressions
from repjax.fusion.kernels import plus, times, widened
from repjax.fusion.windows import Window
from repjax.program import Variable


class Refusal(Exception):  # noqa: N818 - nothing went wrong
  """The reason why something is not merged, in words for the report."""


@dataclasses.dataclass(eq=False)
class Node:
  """A value of the program that depends on the arguments.

  Attributes:
    variable: the variable of the program, a new one for a hidden node.
    table: the table of expressions.
    equation: the equation that makes the value, None for an argument.
    affine: the value as a sum of terms, None if the value is opaque.
    layout: the value as moved numbers of an earlier node, for products over several axes.
    reads: number of equations and outputs that read the value.
    computed: the plan has an instruction that makes the value.
    hidden: the program does not have the value.
    step: the node and the operation that make a hidden value, unless it is a sum.
  """

  variable: Variable
  table: Expressions
  equation: Any = None
  affine: "Affine | None" = None
  layout: Any = None
  reads: int = 1
  computed: bool = False
  hidden: bool = False
  step: "tuple[Node, Any] | None" = None

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the value."""
    return tuple(self.variable.aval.shape)

  @property
  def dtype(self) -> Any:
    """The dtype of the value."""
    return jnp.dtype(self.variable.aval.dtype)

  @property
  def is_open(self) -> bool:
    """Tells if the value is a sum that is not computed yet."""
    return self.affine is not None and not self.computed


def hidden(
  like: Node, shape: tuple[int, ...], dtype: Any, affine: "Affine | None" = None, **given: Any
) -> Node:
  """Returns a node for a value that the program does not have, with the equation of a node."""
  variable = Variable(jax.ShapeDtypeStruct(shape, dtype))
  given = {"equation": like.equation, **given}
  return Node(variable, like.table, affine=affine, hidden=True, **given)


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
  def sums(self) -> bool:
    """Tells if the term sums neighbours without a kernel, as a pool does."""
    return self.kernel is None and any(window.taps > 1 for window in self.windows)

  @property
  def plain(self) -> bool:
    """Tells if each output reads the input at its own place only."""
    return all(map(Window.plain, self.windows, self.source.shape))

  @property
  def features(self) -> int | None:
    """The number of channels that the term adds to, None if not known yet."""
    if self.kernel is not None:
      return self.kernel.shape[-1]
    return None if self.channel is None else self.source.shape[self.channel]

  def with_kernel(self) -> "Term":
    """Returns a term with a kernel that computes the same, a depthwise one if there is none."""
    if self.kernel is not None:
      return self
    one = np.ones((), wide_dtype(self.dtype))
    scale = self.source.table.constant(one) if self.scale is None else self.scale
    taps = tuple(self.windows[axis].taps for axis in self.others)
    kernel = kernels.diagonal(scale, taps=taps, features=self.features)
    return dataclasses.replace(self, kernel=kernel, scale=None, groups=self.features)

  def kernel_in(self, groups: int) -> Expression:
    """Returns the kernel in a number of groups that divides the term's own."""
    term = self.with_kernel()
    assert term.kernel is not None
    return kernels.regrouped(widened(term.kernel), term.groups, groups)


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
  equations: frozenset[Any] = frozenset()

  @property
  def linear(self) -> bool:
    """Tells if the sum is one term without a kernel: its source, moved, scaled and shifted."""
    return len(self.terms) == 1 and self.terms[0].kernel is None and not self.terms[0].sums

  @property
  def is_view(self) -> bool:
    """Tells if the sum is one term that only moves, pads or cuts the source."""
    return self.linear and self.terms[0].scale is None and self.bias is None and not self.borders

  @property
  def has_kernel(self) -> bool:
    """Tells if a product is among the terms."""
    return any(term.kernel is not None for term in self.terms)

  def replacing(self, *equations: Any) -> "Affine":
    """Returns the same sum, noted as a replacement of further equations."""
    return dataclasses.replace(self, equations=self.equations | {*equations})

  def segments(self) -> set[tuple[int, int | None]]:
    """Returns the ranges of channels that the terms add to, as first channel and number."""
    return {(term.start, term.features) for term in self.terms}

  def with_channel(self, axis: int | None) -> "Affine":
    """Returns the same sum with an axis of the value as its channels, None for any axis.

    Raises:
      Refusal: the channels lie along a different axis already, or are padded, cut or new.
    """
    if axis is None or self.channel == axis:
      return self
    if self.channel is not None:
      raise Refusal("a vector along a different axis than the channels")
    terms = []
    for term in self.terms:
      place = term.view[axis]
      if place is None or not term.windows[place].plain(term.source.shape[place]):
        raise Refusal("channels that are padded, cut or of length 1")
      terms.append(dataclasses.replace(term, channel=place))
    return dataclasses.replace(self, terms=tuple(terms), channel=axis)

  def scaled(self, scale: Expression) -> "Affine":
    """Returns the sum times a number () or a vector (C,)."""
    scale = widened(scale)
    terms = tuple(scaled_term(term, part_of(scale, term)) for term in self.terms)
    bias = None if self.bias is None else times(self.bias, scale)
    borders = tuple(Border(times(each.kernel, scale), each.windows) for each in self.borders)
    return dataclasses.replace(self, terms=terms, bias=bias, borders=borders)

  def shifted(self, shift: Expression | None) -> "Affine":
    """Returns the sum plus a number () or a vector (C,)."""
    bias = plus(self.bias, None if shift is None else widened(shift))
    return dataclasses.replace(self, bias=bias)

  def at_channels(self, start: int, length: int) -> "Affine":
    """Returns the sum at a place among more channels, all others zero."""
    if self.channel is None:
      return self
    features = self.shape[self.channel]

    def placed(value: Expression) -> Expression:
      return kernels.at_channels(value, start, features, length)

    shape = (*self.shape[: self.channel], length, *self.shape[self.channel + 1 :])
    return dataclasses.replace(
      self,
      shape=shape,
      terms=tuple(dataclasses.replace(term, start=term.start + start) for term in self.terms),
      bias=self.bias and placed(self.bias),
      borders=tuple(Border(placed(each.kernel), each.windows) for each in self.borders),
    )

  def joined(self, other: "Affine") -> "Affine":
    """Returns the terms, shifts and borders of two sums together."""
    return Affine(
      self.shape,
      self.terms + other.terms,
      plus(self.bias, other.bias),
      self.borders + other.borders,
      other.channel if self.channel is None else self.channel,
      self.equations | other.equations,
    )


def scaled_term(term: Term, scale: Expression) -> Term:
  """Returns a term times a number () or a vector of the term's channels."""
  if term.kernel is not None:
    return dataclasses.replace(term, kernel=times(widened(term.kernel), scale))
  product = scale if term.scale is None else times(term.scale, scale)
  return dataclasses.replace(term, scale=product)


def part_of(vector: Expression, term: Term) -> Expression:
  """Returns the part of a number () or a vector (C,) at the channels that a term adds to."""
  if not vector.shape or term.features in (None, vector.shape[0]):
    return vector
  assert term.features is not None
  return kernels.channels(vector, start=term.start, stop=term.start + term.features)


def affine_of(node: Node) -> Affine:
  """Returns a node as a sum of terms. A node that is computed is the identity of itself."""
  return identity(node) if node.affine is None else node.affine


def identity(node: Node) -> Affine:
  """Returns the sum whose only term is the node itself."""
  windows = tuple(map(Window, node.shape))
  term = Term(node, tuple(range(len(windows))), windows, None, node.dtype, names=("identity",))
  return Affine(node.shape, (term,))


def added(first: Affine, second: Affine) -> Affine:
  """Returns the sum of two sums of one shape.

  Raises:
    Refusal: their channels lie along different axes, or differ in how they are concatenated.
  """
  channel = second.channel if first.channel is None else first.channel
  first, second = first.with_channel(channel), second.with_channel(channel)
  if first.segments() != second.segments():
    raise Refusal("a sum with channels that are concatenated")
  return first.joined(second)


def negated(affine: Affine) -> Affine:
  """Returns the sum times -1."""
  return affine.scaled(affine.terms[0].source.table.constant(np.float32(-1)))
