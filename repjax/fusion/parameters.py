"""Expressions for all equations that depend on parameters alone.

Two more forms of each value are kept for the rules. The compact form leaves axes at length 1 that a
broadcast made longer, so that a vector is still seen as a vector. The precise form leaves out casts
to a narrower dtype, so that a fused kernel is rounded once, at the end.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from repjax.fusion.expressions import Expression, Expressions, derived
from repjax.program import Equation, Variable

_MOVES = {"broadcast_in_dim", "reshape", "squeeze", "transpose", "copy", "slice", "rev"}
"""Primitives that compute the same in any dtype."""


@dataclasses.dataclass
class Parameters:
  """The expressions of all variables that depend on parameters and constants alone.

  Attributes:
    table: the table of expressions.
    values: the expression of each variable.
    compact: other expressions for variables that broadcasts made longer.
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
    if equation.primitive == "broadcast_in_dim":
      self._add_compact(equation, inputs[0])
    self._add_precise(equation, inputs)

  def _add_compact(self, equation: Equation, value: Expression) -> None:
    shape = [1] * len(equation.params["shape"])
    for size, axis in zip(value.shape, equation.params["broadcast_dimensions"]):
      shape[axis] = size
    self.compact[equation.outputs[0]] = derived(_reshaped, value, shape=tuple(shape))

  def _add_precise(self, equation: Equation, inputs: Sequence[Expression]) -> None:
    source = equation.inputs[0] if equation.inputs else None
    before = self.precise.get(source, inputs[0]) if inputs else None  # type: ignore[arg-type]
    if before is None or not jnp.issubdtype(before.dtype, jnp.floating):
      return
    output = equation.outputs[0]
    if equation.primitive == "convert_element_type":
      if jnp.issubdtype(equation.params["new_dtype"], jnp.floating):
        self.precise[output] = before
    elif equation.primitive in _MOVES and before is not inputs[0]:
      (self.precise[output],) = self.table.equation(_in_dtype(equation, before), [before])


def _in_dtype(equation: Equation, value: Expression) -> Equation:
  """Returns an equation that only moves numbers, for numbers of a different dtype."""
  outputs = tuple(
    Variable(jax.ShapeDtypeStruct(output.aval.shape, value.dtype)) for output in equation.outputs
  )
  return dataclasses.replace(equation, outputs=outputs)


def _reshaped(value: Any, shape: tuple[int, ...]) -> Any:
  return value.reshape(shape)
