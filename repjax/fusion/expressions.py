"""Values that depend on parameters alone, as expressions that are evaluated later.

A plan is made once, and the fold of a plan runs for any parameters. So a plan computes nothing: it
writes down how each fused kernel follows from the leaves of the parameter tree. An expression is
one such computation. `later` turns a pure function into one of expressions, and `evaluate` computes
them. A table holds each expression once. Two plans that share a table fold a parameter in the same
way exactly if both hold the same object.

Example:
  >>> table = Expressions()
  >>> leaf = table.leaf(0, jax.ShapeDtypeStruct((2,), jnp.float32))
  >>> double = table.derived(jnp.multiply, leaf, table.constant(np.float32(2)))
  >>> evaluate([double], [jnp.ones(2)])
  [Array([2., 2.], dtype=float32)]
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from repjax.program import Equation, Variable

_BYTES = 1 << 20
"""Constants up to this size are compared by content, and larger ones by identity."""

_KNOWN = 16
"""Constants up to this number of elements are computed at once, for rules that look at them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Expression:
  """A value that follows from parameters and constants.

  Attributes:
    table: the table that holds the expression.
    serial: position in the table, after the positions of all inputs.
    function: computes the value from the inputs' values. None for a leaf and for a constant.
    inputs: the expressions that the function reads.
    aval: shape and dtype of the value.
    leaves: positions of the parameters on which the value depends. Empty for a constant.
    value: the array of a constant.
  """

  table: "Expressions"
  serial: int
  function: Callable[..., Any] | None
  inputs: tuple["Expression", ...]
  aval: Any
  leaves: frozenset[int]
  value: Any = None

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the value."""
    return tuple(self.aval.shape)

  @property
  def dtype(self) -> Any:
    """The dtype of the value."""
    return self.aval.dtype

  @property
  def size(self) -> int:
    """The number of elements of the value."""
    return math.prod(self.shape)

  @property
  def known(self) -> bool:
    """Tells if the value is a constant whose numbers can be read now.

    A function that is fused while JAX traces it may close over tracers, whose numbers come later.
    """
    return self.value is not None and not isinstance(self.value, Tracer)


class Expressions:
  """A table of expressions, in which equal expressions are one object.

  Attributes:
    traced: a constant is a tracer, whose numbers are not known yet.
  """

  def __init__(self):
    self._known: dict[Any, Expression] = {}
    self.traced = False
    self._avals: dict[Any, Any] = {}
    self._alive: list[Any] = []
    self._children: dict[Any, Expressions] = {}

  def child(self, key: Any) -> "Expressions":
    """Returns the table of a program inside this one, such as the body of a loop."""
    return self._children.setdefault(key, Expressions())

  def leaf(self, index: int, aval: Any) -> Expression:
    """Returns the expression of a parameter."""
    return self._entry(("leaf", index), None, (), aval, frozenset([index]))

  def constant(self, array: Any) -> Expression:
    """Returns the expression of an array that is known."""
    array = array if hasattr(array, "dtype") else np.asarray(array)
    aval = jax.ShapeDtypeStruct(np.shape(array), array.dtype)
    if isinstance(array, Tracer) or jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
      key: Any = id(array)
      self.traced |= isinstance(array, Tracer)
    else:
      key = np.asarray(array).tobytes() if array.nbytes <= _BYTES else id(array)
    self._alive.append(array)  # so that no other array gets the same id
    key = ("constant", str(aval.dtype), aval.shape, key)
    return self._entry(key, None, (), aval, frozenset(), array)

  def equation(self, equation: Equation, inputs: Sequence[Expression]) -> list[Expression]:
    """Returns the expressions of an equation's outputs, constants if they are small and known."""
    known = all(each.known for each in inputs)
    if known and all(math.prod(output.aval.shape) <= _KNOWN for output in equation.outputs):
      with jax.ensure_compile_time_eval():
        return [self.constant(each) for each in equation.run(*(each.value for each in inputs))]
    try:
      settings = tuple(sorted(equation.params.items()))
      hash(settings)
    except TypeError:  # settings without a hash or an order, such as functions
      settings = id(equation)
      self._alive.append(equation)
    key = (equation.source.primitive, settings, tuple(each.serial for each in inputs))
    avals = [output.aval for output in equation.outputs]
    leaves = frozenset().union(*(each.leaves for each in inputs))
    whole = self._entry(key, equation.run, tuple(inputs), avals, leaves)
    return [
      self._entry((whole.serial, place), functools.partial(_pick, place), (whole,), aval, leaves)
      for place, aval in enumerate(avals)
    ]

  def derived(self, function: Callable[..., Any], *inputs: Expression, **static: Any) -> Expression:
    """Returns the expression of a function of expressions.

    Args:
      function: a pure function of arrays that a module or class holds by name.
      *inputs: what the function reads.
      **static: further arguments that are known and have a hash.
    """
    key = (function, tuple(sorted(static.items())), tuple(each.serial for each in inputs))
    if key in self._known:
      return self._known[key]
    call = functools.partial(function, **static)
    # Blocks of a network are alike, and tracing for a shape is most of the time of planning.
    form = (*key[:2], *((each.shape, each.dtype) for each in inputs))
    if form not in self._avals:
      self._avals[form] = jax.eval_shape(call, *(each.aval for each in inputs))
    aval = self._avals[form]
    leaves = frozenset().union(*(each.leaves for each in inputs))
    return self._entry(key, call, inputs, aval, leaves)

  def _entry(self, key: Any, function: Any, inputs: Any, aval: Any, leaves: Any, value: Any = None):
    """Returns the expression with a key, and makes it if the table has none."""
    if key not in self._known:
      entry = Expression(self, len(self._known), function, inputs, aval, leaves, value)
      self._known[key] = entry
    return self._known[key]


def _pick(place: int, results: Sequence[Any]) -> Any:
  """Returns one result of an equation."""
  return results[place]


def later(function: Callable[..., Any]) -> Callable[..., Expression]:
  """Turns a function of arrays into the same function of expressions.

  Positional arguments are expressions. Keyword arguments are known now, and have a hash.
  """

  @functools.wraps(function)
  def call(*inputs: Expression, **static: Any) -> Expression:
    return inputs[0].table.derived(function, *inputs, **static)

  return call


def evaluate(wanted: Iterable[Expression], leaves: Sequence[Any] | Mapping[int, Any]) -> list[Any]:
  """Computes expressions.

  Args:
    wanted: the expressions.
    leaves: the arrays of all parameters, by position in the tree.

  Returns:
    One array for each expression. Each common part is computed once.
  """
  wanted = list(wanted)
  needed: dict[int, Expression] = {}
  stack = list(wanted)
  while stack:
    each = stack.pop()
    if each.serial not in needed:
      needed[each.serial] = each
      stack.extend(each.inputs)
  values: dict[int, Any] = {}
  for serial, each in sorted(needed.items()):
    if each.function is not None:
      values[serial] = each.function(*(values[given.serial] for given in each.inputs))
    elif each.leaves:
      (index,) = each.leaves
      values[serial] = leaves[index]
    else:
      values[serial] = jnp.asarray(each.value)
  return [values[each.serial] for each in wanted]


@later
def reshaped(value: Any, *, shape: tuple[int, ...]) -> Any:
  """Returns an array in a shape."""
  return value.reshape(shape)


_MOVES = {"broadcast_in_dim", "reshape", "squeeze", "transpose", "copy", "slice", "rev"}
"""Primitives that compute the same in any dtype."""


_POINTWISE = {"add", "sub", "mul", "div", "neg", "sqrt", "rsqrt", "convert_element_type"}
"""Primitives of each number alone, as norms have them."""


@dataclasses.dataclass
class Parameters:
  """The expressions of all variables that depend on parameters and constants alone.

  Two more forms of each value are kept for the rules. The compact form leaves axes at length 1 that
  a broadcast made longer, so that a vector is still seen as a vector. The precise form leaves out
  casts to a narrower dtype, so that a fused kernel is rounded once, at the end. A value that was
  narrowed and widened again has no precise form, because the function means it to be rounded.

  Attributes:
    table: the table of expressions.
    values: the expression of each variable.
    compact: other expressions for variables that broadcasts made longer, and for what pointwise
      operations make of them.
    precise: other expressions for variables that were rounded.
    makers: the equation that makes each variable.
  """

  table: Expressions
  values: dict[Variable, Expression] = dataclasses.field(default_factory=dict)
  compact: dict[Variable, Expression] = dataclasses.field(default_factory=dict)
  precise: dict[Variable, Expression] = dataclasses.field(default_factory=dict)
  makers: dict[Variable, Equation] = dataclasses.field(default_factory=dict)

  def add(self, equation: Equation, inputs: Sequence[Expression]) -> None:
    """Notes what an equation computes from expressions."""
    outputs = self.table.equation(equation, inputs)
    for variable, expression in zip(equation.outputs, outputs):
      self.values[variable] = expression
      self.makers[variable] = equation
    self._add_compact(equation, inputs)
    self._add_precise(equation, inputs)

  def _add_compact(self, equation: Equation, inputs: Sequence[Expression]) -> None:
    short = [
      self.compact.get(given, value) if isinstance(given, Variable) else value
      for given, value in zip(equation.inputs, inputs)
    ]
    if equation.primitive == "broadcast_in_dim":
      longer = [1] * len(equation.params["shape"])
      for size, axis in zip(short[0].shape, equation.params["broadcast_dimensions"]):
        longer[axis] = size
      self.compact[equation.outputs[0]] = reshaped(short[0], shape=tuple(longer))
    elif equation.primitive in _POINTWISE and short != list(inputs):
      shapes = {each.shape for each in short if each.shape}
      if len(shapes) == 1:
        (shape,) = shapes
        aval = jax.ShapeDtypeStruct(shape, equation.outputs[0].aval.dtype)
        same = dataclasses.replace(equation, outputs=(Variable(aval),))
        (self.compact[equation.outputs[0]],) = self.table.equation(same, short)

  def _add_precise(self, equation: Equation, inputs: Sequence[Expression]) -> None:
    source = equation.inputs[0] if equation.inputs else None
    before = self.precise.get(source, inputs[0]) if inputs else None  # type: ignore[arg-type]
    if before is None or not jnp.issubdtype(before.dtype, jnp.floating):
      return
    output = equation.outputs[0]
    if equation.primitive == "convert_element_type":
      if rounds(inputs[0].dtype, equation.params["new_dtype"]):
        self.precise[output] = before
    elif equation.primitive in _MOVES and before is not inputs[0]:
      (self.precise[output],) = self.table.equation(_in_dtype(equation, before), [before])


def rounds(old: Any, new: Any) -> bool:
  """Tells if a cast from one floating-point dtype to another only rounds, or changes nothing.

  A cast that widens does not round, and a cast to 8 bits or fewer does more: it quantizes.
  """
  if not jnp.issubdtype(new, jnp.floating) or jnp.dtype(new).itemsize < 2:
    return False
  before, after = jnp.finfo(old), jnp.finfo(new)
  return after.nmant <= before.nmant and after.maxexp <= before.maxexp


def _in_dtype(equation: Equation, value: Expression) -> Equation:
  """Returns an equation that only moves numbers, for numbers of a different dtype."""
  outputs = tuple(
    Variable(jax.ShapeDtypeStruct(output.aval.shape, value.dtype)) for output in equation.outputs
  )
  return dataclasses.replace(equation, outputs=outputs)
