"""Rules for arithmetic and for channels: which equations are affine, and what they become.

A rule takes an equation and its operands. It returns the result as a sum of terms, or None where
the result is not affine in the operands. It raises `Refusal` where a reader should be told why.

Where a convolution is among the parts of a concatenation, the concatenation stays a sum: each term
says at which channel of the value it starts. A norm after the concatenation then merges into all
convolutions, and a convolution after it may merge with each of them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from repjax.fusion import kernels
from repjax.fusion.expressions import Expression, Expressions, reshaped, rounds
from repjax.fusion.kernels import inverse, opposite, widened
from repjax.fusion.values import Affine, Border, Node, Refusal, added, affine_of, negated

Operand = Node | Expression


@dataclasses.dataclass(frozen=True)
class Given:
  """An equation with its operands.

  Attributes:
    equation: the equation.
    shape: of the result.
    table: the table of expressions.
    operands: nodes, and expressions of what depends on parameters alone.
    compact: the operands, with length 1 along axes that a broadcast made longer.
    precise: the operands, with parameters as they were before a cast to a narrower dtype.
    moved: the hidden nodes of moved values, by what they are.
  """

  equation: Any
  shape: tuple[int, ...]
  table: Expressions
  operands: Sequence[Operand]
  compact: Sequence[Operand]
  precise: Sequence[Operand]
  moved: dict[Any, Node]

  @property
  def dtype(self) -> Any:
    """The dtype of the result."""
    return self.equation.outputs[0].aval.dtype

  @property
  def params(self) -> Any:
    """The parameters of the equation."""
    return self.equation.params

  def node(self, place: int = 0) -> Node | None:
    """Returns an operand if it is a node."""
    operand = self.operands[place]
    return operand if isinstance(operand, Node) else None


Rule = Callable[[Given], Any]
"""Returns an `Affine`, or a `Layout` (see `layouts`), or None."""


def _sides(given: Given) -> tuple[Affine, Expression, bool] | None:
  """Returns the operands of an operation of a node and a number or vector, None for two nodes.

  The last result tells if the node comes first.
  """
  first = isinstance(given.operands[0], Node)
  node, other = given.operands[not first], given.compact[first]
  if not isinstance(node, Node) or not isinstance(other, Expression):
    return None
  if node.shape != given.shape:
    raise Refusal(f"a value {node.shape} that is broadcast to {given.shape}")
  axis, vector = _vector(other, given.shape)
  return affine_of(node).with_channel(axis).replacing(given.equation), vector, first


def _vector(value: Expression, shape: tuple[int, ...]) -> tuple[int | None, Expression]:
  """Returns the axis that a value varies along and the vector, or None and a number ().

  Raises:
    Refusal: the value varies along several axes.
  """
  long = [axis for axis, size in enumerate(value.shape) if size != 1]
  if not long:
    return None, reshaped(widened(value), shape=())
  if len(long) > 1 or len(value.shape) != len(shape):
    raise Refusal(f"a value {value.shape} that varies along several axes")
  return long[0], reshaped(widened(value), shape=(-1,))


def multiply(given: Given) -> Affine | None:
  """Applies the rule of a product: a scale."""
  sides = _sides(given)
  return None if sides is None else sides[0].scaled(sides[1])


def divide(given: Given) -> Affine | None:
  """Applies the rule of a quotient: a scale by the inverse."""
  sides = None if given.node(1) is not None else _sides(given)
  return None if sides is None else sides[0].scaled(inverse(sides[1]))


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
    total = added(affine_of(first), negated(other) if negative else other)
    return total.replacing(given.equation)
  sides = _sides(given)
  if sides is None:
    return None
  affine, vector, node_first = sides
  if negative and node_first:
    vector = opposite(vector)
  elif negative:
    affine = negated(affine)
  return affine.shifted(vector)


def negate(given: Given) -> Affine | None:
  """Applies the rule of a negative."""
  node = given.node()
  return None if node is None else negated(affine_of(node)).replacing(given.equation)


def convert(given: Given) -> Affine | None:
  """Applies the rule of a cast between floating-point dtypes.

  A term without a kernel takes the narrower dtype. A product keeps its own.

  Raises:
    Refusal: the cast quantizes, or widens what was computed in more than the narrow dtype holds.
  """
  node = given.node()
  if node is None:
    return None
  old, new = node.dtype, jnp.dtype(given.params["new_dtype"])
  if not jnp.issubdtype(old, jnp.floating) or (old.itemsize == new.itemsize and old != new):
    return None
  if not rounds(old, new):
    _check_widened(affine_of(node), old, new)
  terms = tuple(
    dataclasses.replace(term, dtype=new)
    if term.kernel is None and new.itemsize < term.dtype.itemsize
    else term
    for term in affine_of(node).terms
  )
  return dataclasses.replace(affine_of(node), terms=terms)


def _check_widened(affine: Affine, old: Any, new: Any) -> None:
  """Refuses to leave out a cast to a narrow dtype that rounds more than the function's products."""
  if min(old.itemsize, new.itemsize) < 2:
    raise Refusal(f"a cast from {old} to {new}")
  for term in affine.terms:
    origin = term.source.dtype if term.kernel is None else term.dtype
    if not rounds(old, origin):
      raise Refusal(f"a cast to {old} and back of what was computed in {origin}")


def copy(given: Given) -> Affine | None:
  """Applies the rule of a copy, or of a name for a value."""
  node = given.node()
  return None if node is None else affine_of(node)


def concatenate(given: Given) -> Affine | None:
  """Applies the rule of a concatenation: parts at different channels."""
  axis = given.params["dimension"]
  parts = [affine_of(each) for each in given.operands if isinstance(each, Node)]
  if len(parts) < len(given.operands) or not any(part.has_kernel for part in parts):
    return None
  total, start = Affine(given.shape, (), channel=axis), 0
  for part in parts:
    total = total.joined(part.with_channel(axis).at_channels(start, given.shape[axis]))
    start += part.shape[axis]
  return total.replacing(given.equation)


def cut_channels(given: Given) -> Affine | None:
  """Applies the rule of a slice of the channels of a product."""
  node, params = given.node(), given.params
  affine = None if node is None else node.affine
  if node is None or affine is None or not affine.has_kernel:
    return None
  changed = [axis for axis, size in enumerate(given.shape) if size != node.shape[axis]]
  if changed != [affine.channel] or params["strides"] not in (None, (1,) * len(given.shape)):
    return None
  start = params["start_indices"][changed[0]]
  stop = start + given.shape[changed[0]]
  if len(affine.segments()) > 1 or any(
    term.kernel is None or term.groups > 1 for term in affine.terms
  ):
    raise Refusal("a cut through channels of groups, of a source or of a concatenation")

  def part(value: Expression) -> Expression:
    return kernels.channels(value, start=start, stop=stop)

  terms = [dataclasses.replace(each, kernel=part(each.kernel)) for each in affine.terms]  # type: ignore[arg-type]
  cut = Affine(
    given.shape,
    tuple(terms),
    affine.bias and part(affine.bias),
    tuple(Border(part(border.kernel), border.windows) for border in affine.borders),
    affine.channel,
    affine.equations,
  )
  return cut.replacing(given.equation)


ELEMENTWISE: dict[str, Rule] = {
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
