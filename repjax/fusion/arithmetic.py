"""Rules for arithmetic: which equations between values are affine, and what they become.

A rule takes an equation and its operands. It returns the result as a sum of terms, or None where
the result is not affine in the operands. It raises `Refusal` where a reader should be told why.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from repjax.fusion.expressions import Expression, Expressions, derived
from repjax.fusion.values import (
  Affine,
  Node,
  Refusal,
  added,
  affine_of,
  scaled,
  shifted,
  with_channel,
)
from repjax.fusion.vectors import widened
from repjax.program import Equation

Operand = Node | Expression


@dataclasses.dataclass(frozen=True)
class Given:
  """An equation with its operands.

  Attributes:
    equation: the equation.
    table: the table of expressions.
    operands: nodes, and expressions of what depends on parameters alone.
    compact: the same without the length of axes that a broadcast made.
    precise: the same before the program rounded parameters to a narrower dtype.
  """

  equation: Equation
  table: Expressions
  operands: Sequence[Operand]
  compact: Sequence[Operand]
  precise: Sequence[Operand]

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the result."""
    return tuple(self.equation.outputs[0].aval.shape)

  @property
  def params(self) -> Any:
    """The parameters of the equation."""
    return self.equation.params

  def node(self, place: int = 0) -> Node | None:
    """Returns an operand if it is a node."""
    operand = self.operands[place]
    return operand if isinstance(operand, Node) else None


Rule = Callable[[Given], Affine | None]


@dataclasses.dataclass(frozen=True)
class _Sides:
  """An operation of a node and a number or vector."""

  affine: Affine
  vector: Expression
  node_first: bool


def _sides(given: Given) -> _Sides | None:
  """Returns the operands of an operation of a node and an expression, None for two nodes."""
  first = isinstance(given.operands[0], Node)
  node, other = given.operands[not first], given.compact[first]
  if not isinstance(node, Node) or not isinstance(other, Expression):
    return None
  if node.shape != given.shape:
    raise Refusal(f"a value {node.shape} that is broadcast to {given.shape}")
  axis, vector = _vector(other, given.shape)
  affine = with_channel(affine_of(node), axis)
  affine = dataclasses.replace(affine, equations=affine.equations | {given.equation})
  return _Sides(affine, vector, first)


def _vector(value: Expression, shape: tuple[int, ...]) -> tuple[int | None, Expression]:
  """Returns the axis that a value varies along and the vector, or None and a number ().

  Raises:
    Refusal: the value varies along several axes.
  """
  long = [axis for axis, size in enumerate(value.shape) if size != 1]
  if not long:
    return None, derived(_reshaped, widened(value), shape=())
  if len(long) > 1 or len(value.shape) != len(shape):
    raise Refusal(f"a value {value.shape} that varies along several axes")
  return long[0], derived(_reshaped, widened(value), shape=(-1,))


def _reshaped(value: Any, shape: tuple[int, ...]) -> Any:
  return value.reshape(shape)


def inverse(value: Any) -> Any:
  """Returns 1 / value."""
  return jnp.reciprocal(value)


def opposite(value: Any) -> Any:
  """Returns -value."""
  return jnp.negative(value)


def multiply(given: Given) -> Affine | None:
  """Applies the rule of a product: a scale."""
  sides = None if _is_mean(given) else _sides(given)
  return None if sides is None else scaled(sides.affine, sides.vector)


def divide(given: Given) -> Affine | None:
  """Applies the rule of a quotient: a scale by the inverse."""
  if given.node(1) is not None or _is_mean(given):
    return None
  sides = _sides(given)
  return None if sides is None else scaled(sides.affine, derived(inverse, sides.vector))


def _is_mean(given: Given) -> bool:
  """Checks if a sum over pixels is divided by a number, which depends on the size of the input.

  A kernel that held the number would not be the same at all sizes.
  """
  for operand, other in zip(given.operands, reversed(given.operands)):
    if isinstance(operand, Node) and isinstance(other, Expression) and not other.leaves:
      return _sums_over_all(operand)
  return False


def _sums_over_all(node: Node) -> bool:
  affine = affine_of(node)
  if affine.is_view and affine.terms[0].source is not node:
    return _sums_over_all(affine.terms[0].source)
  if node.equation is not None and node.equation.primitive == "reduce_sum":
    return node.affine is None
  pools = [term for term in affine.terms if term.sums]
  return any(
    window.taps > 1 and window.taps >= size
    for term in pools
    for window, size in zip(term.windows, term.source.shape)
  )


def add(given: Given) -> Affine | None:
  """Applies the rule of a sum: a shift, or branches side by side."""
  return _sum(given, negative=False)


def subtract(given: Given) -> Affine | None:
  """Applies the rule of a difference."""
  return _sum(given, negative=True)


def _sum(given: Given, negative: bool) -> Affine | None:
  first, second = given.operands
  if isinstance(first, Node) and isinstance(second, Node):
    if first.shape != second.shape:
      return None
    other = affine_of(second)
    total = added(affine_of(first), negated(other, given.table) if negative else other)
    return dataclasses.replace(total, equations=total.equations | {given.equation})
  sides = _sides(given)
  if sides is None:
    return None
  affine, vector = sides.affine, sides.vector
  if negative and sides.node_first:
    vector = derived(opposite, vector)
  elif negative:
    affine = negated(affine, given.table)
  return shifted(affine, vector)


def negated(affine: Affine, table: Expressions) -> Affine:
  """Returns the sum times -1."""
  return scaled(affine, table.constant(np.float32(-1)))


def negate(given: Given) -> Affine | None:
  """Applies the rule of a negative."""
  node = given.node()
  if node is None:
    return None
  affine = negated(affine_of(node), given.table)
  return dataclasses.replace(affine, equations=affine.equations | {given.equation})


def convert(given: Given) -> Affine | None:
  """Applies the rule of a cast between floating-point dtypes.

  A term without a kernel takes the narrower dtype. A product keeps its own.
  """
  node = given.node()
  if node is None:
    return None
  old, new = node.dtype, jnp.dtype(given.params["new_dtype"])
  if not jnp.issubdtype(old, jnp.floating) or (old.itemsize == new.itemsize and old != new):
    return None
  terms = tuple(
    dataclasses.replace(term, dtype=new)
    if term.kernel is None and new.itemsize < term.dtype.itemsize
    else term
    for term in affine_of(node).terms
  )
  return dataclasses.replace(affine_of(node), terms=terms)


def copy(given: Given) -> Affine | None:
  """Applies the rule of a copy, or of a name for a value."""
  node = given.node()
  return None if node is None else affine_of(node)


RULES: dict[str, Rule] = {
  "add": add,
  "add_any": add,
  "convert_element_type": convert,
  "copy": copy,
  "div": divide,
  "mul": multiply,
  "name": copy,
  "neg": negate,
  "sub": subtract,
}
