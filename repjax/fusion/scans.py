"""Loops over stacked blocks: the body of a scan is fused like a function of its own.

In the body, what the scan reads from stacked parameters, or holds fixed, are the parameters; the
carry and everything else are the arguments. What the body's fold would compute for each step is
computed for all steps at once, by the fold of the whole function.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import lax

from repjax.fusion.expressions import Expression, evaluate, later
from repjax.fusion.plan import Plan
from repjax.fusion.report import Counts
from repjax.fusion.values import Node
from repjax.program import Equation, constants_and_carries


@dataclasses.dataclass(frozen=True, eq=False)
class FusedScan:
  """A scan whose body was fused, as an instruction.

  Attributes:
    equation: the scan of the traced program.
    body: the plan of its body. Arguments are the body's inputs that are no parameters.
    moving: places of these inputs among the operands of the scan.
    stored: the stored arrays of the body, of all steps.
    mapped: names of those arrays that differ between steps.
    counts: what the products of the body cost in all steps.
  """

  equation: Equation
  body: Plan
  moving: tuple[int, ...]
  stored: tuple[Expression, ...]
  mapped: frozenset[str]
  counts: Counts

  def run(self, *values: Any) -> Sequence[Any]:
    """Runs the scan from the operands that are no parameters, and the stored arrays."""
    params = self.equation.params
    first, carries = constants_and_carries(self.equation)
    end = first + carries
    given = dict(zip(self.moving, values))
    held = dict(zip(self.body.stored, values[len(self.moving) :]))
    fixed = {name: array for name, array in held.items() if name not in self.mapped}
    stacked = {name: array for name, array in held.items() if name in self.mapped}
    consts = [given[place] for place in self.moving if place < first]
    carry = [given[place] for place in self.moving if first <= place < end]
    sequences = [given[place] for place in self.moving if place >= end]

    def step(carry: list[Any], each: tuple[list[Any], Mapping[str, Any]]):
      results = self.body.call({**fixed, **each[1]}, [*consts, *carry, *each[0]])
      return results[: len(carry)], results[len(carry) :]

    carry, outputs = lax.scan(
      step,
      carry,
      (sequences, stacked),
      length=params["length"],
      reverse=params["reverse"],
      unroll=params["unroll"],
    )
    return [*carry, *outputs]


def fixed_inputs(equation: Equation, operands: Sequence[Node | Expression]) -> list[int]:
  """Returns the places of the inputs of a scan's body that follow from parameters alone."""
  first, carries = constants_and_carries(equation)
  return [
    place
    for place, each in enumerate(operands)
    if isinstance(each, Expression) and not first <= place < first + carries
  ]


def fused_scan(
  equation: Equation, operands: Sequence[Node | Expression], body: Plan, counts: Counts
) -> FusedScan:
  """Returns the instruction of a scan with a fused body.

  Args:
    equation: the scan.
    operands: what it reads, one for each input of the body.
    body: the plan of its body.
    counts: what the products of the fused body cost in one step.
  """
  fixed = fixed_inputs(equation, operands)
  first_mapped = sum(constants_and_carries(equation))
  found = {name: _of_all_steps(each, operands, first_mapped) for name, each in body.stored.items()}
  return FusedScan(
    equation,
    body,
    moving=tuple(place for place in range(len(operands)) if place not in fixed),
    stored=tuple(stored for stored, _ in found.values()),
    mapped=frozenset(name for name, (_, mapped) in found.items() if mapped),
    counts=counts.times(equation.params["length"]),
  )


def _of_all_steps(
  expression: Expression, operands: Sequence[Node | Expression], first_mapped: int
) -> tuple[Expression, bool]:
  """Returns a stored array of a body as an expression of the whole, and if steps differ in it."""
  leaves = tuple(sorted(expression.leaves))
  mapped = tuple(leaf >= first_mapped for leaf in leaves)
  given = [operands[leaf] for leaf in leaves]
  inputs = [each for each in given if isinstance(each, Expression)]
  if expression.function is None:
    return inputs[0], mapped[0]
  return _stacked(*inputs, expression=expression, leaves=leaves, mapped=mapped), any(mapped)


@later
def _stacked(
  *arrays: Any, expression: Expression, leaves: tuple[int, ...], mapped: tuple[bool, ...]
) -> Any:
  """Returns a stored array of all steps, stacked; or the array itself if steps share it.

  Args:
    *arrays: the inputs of the body that the array depends on, of all steps.
    expression: the array of one step.
    leaves: the places of these inputs.
    mapped: for each of them if it differs between steps.
  """

  def of_step(*arrays: Any) -> Any:
    (value,) = evaluate([expression], dict(zip(leaves, arrays)))
    return value

  axes = tuple(0 if each else None for each in mapped)
  return jax.vmap(of_step, in_axes=axes)(*arrays) if any(mapped) else of_step(*arrays)
