"""Loops and choices: the programs that they hold are fused like functions of their own.

Inputs of such a program that follow from parameters alone, stacked ones included, count as its
parameters. Carries and all other inputs are its arguments. What the fold of a body would compute
for each step of a scan is computed for all steps at once, by the fold of the whole function.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from repjax.fusion.expressions import Expression, evaluate, later
from repjax.fusion.plan import Plan
from repjax.fusion.report import Counts
from repjax.fusion.values import Node
from repjax.program import (
  Equation,
  Program,
  constant_array,
  constants_and_carries,
  flat,
  interpret,
)


class Body(NamedTuple):
  """A program that an equation holds.

  Attributes:
    program: the program.
    places: for each of its inputs the place of the operand that it reads.
    carried: its inputs that change from step to step.
    mapped: its inputs that are a row of the operand in each step.
    steps: how often it runs, 1 if not known.
  """

  program: Program
  places: Sequence[int]
  carried: Sequence[int] = ()
  mapped: Sequence[int] = ()
  steps: int = 1

  def fixed(self, operands: Sequence[Node | Expression]) -> list[int]:
    """Returns its inputs that follow from parameters alone, from all operands of the equation."""
    return [
      place
      for place, operand in enumerate(self.places)
      if isinstance(operands[operand], Expression) and place not in self.carried
    ]


def bodies_of(equation: Equation) -> list[Body]:
  """Returns the programs of a loop or a choice, none for any other equation."""
  params, scope, count = equation.params, equation.scope, len(equation.inputs)
  if equation.primitive == "scan":
    first, carries = constants_and_carries(equation)
    program, end = flat(params["jaxpr"], scope), first + carries
    steps = params["length"]
    return [Body(program, range(count), range(first, end), range(end, count), steps)]
  if equation.primitive == "cond":
    return [Body(flat(each, scope), range(1, count)) for each in params["branches"]]
  # Where images are mapped, a loop may run for some of them only, and is then left alone.
  if equation.primitive == "while" and flat(params["cond_jaxpr"]).outputs[0].aval.shape == ():
    bodies, start = [], 0
    carry = range(params["cond_nconsts"] + params["body_nconsts"], count)
    for name in ("cond", "body"):
      constants = params[f"{name}_nconsts"]
      places = (*range(start, start + constants), *carry)
      program = flat(params[f"{name}_jaxpr"], scope)
      bodies.append(Body(program, places, range(constants, len(places))))
      start += constants
    return bodies
  return []


@dataclasses.dataclass(frozen=True, eq=False)
class FusedBody:
  """A fused program of a loop or a choice.

  Attributes:
    body: the program.
    plan: how it runs. The plan's arguments are the program's inputs that are no parameters.
    moving: places of the operands that these inputs read.
    stored: the stored arrays of the plan, of all steps, as expressions of the whole function.
    mapped: names of those arrays that differ between steps.
  """

  body: Body
  plan: Plan
  moving: tuple[int, ...]
  stored: Mapping[str, Expression]
  mapped: frozenset[str]

  def run(self, held: Mapping[Any, Any], rows: Mapping[str, Any] | None = None) -> list[Any]:
    """Runs the program.

    Args:
      held: what the program reads, by the place of the operand or by its expression.
      rows: stored arrays of one step.
    """
    arrays = {name: held[each] for name, each in self.stored.items() if name not in self.mapped}
    return self.plan.call({**arrays, **(rows or {})}, [held[place] for place in self.moving])


def fused_body(body: Body, plan: Plan, operands: Sequence[Node | Expression]) -> FusedBody:
  """Returns a fused program, from its plan and from what the equation reads."""
  fixed = body.fixed(operands)
  moving = tuple(each for place, each in enumerate(body.places) if place not in fixed)
  found = {name: _of_all_steps(each, body, operands) for name, each in plan.stored.items()}
  mapped = frozenset(name for name, (_, mapped) in found.items() if mapped)
  return FusedBody(body, plan, moving, {name: each for name, (each, _) in found.items()}, mapped)


def _of_all_steps(
  expression: Expression, body: Body, operands: Sequence[Node | Expression]
) -> tuple[Expression, bool]:
  """Returns a stored array of a body as an expression of the whole, and if steps differ in it."""
  leaves = tuple(sorted(expression.leaves))
  mapped = tuple(leaf in body.mapped for leaf in leaves)
  given = [operands[body.places[leaf]] for leaf in leaves]
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


@dataclasses.dataclass(frozen=True, eq=False)
class FusedBodies:
  """A loop or a choice whose programs were fused, as an instruction.

  Attributes:
    equation: of the traced program.
    bodies: its programs.
    counts: what the products of all of them cost, in all steps.
  """

  equation: Equation
  bodies: tuple[FusedBody, ...]
  counts: Counts

  @property
  def moving(self) -> list[int]:
    """The places of the operands that are read as they are: the choice, carries, arguments."""
    choice = {0} if self.equation.primitive == "cond" else set()
    return sorted(choice.union(*(body.moving for body in self.bodies)))

  @property
  def stored(self) -> list[Expression]:
    """The stored arrays of all programs, of all steps."""
    return list(dict.fromkeys(each for body in self.bodies for each in body.stored.values()))

  def run(self, *values: Any) -> Sequence[Any]:
    """Runs the loop or choice from the operands that are no parameters, and the stored arrays."""
    held = dict(zip([*self.moving, *self.stored], values))
    if self.equation.primitive == "cond":
      return lax.switch(held[0], [functools.partial(each.run, held) for each in self.bodies])
    if self.equation.primitive == "scan":
      return self._scan(held)
    carried, (test, step) = range(*self._carried()), self.bodies

    def with_carry(carry: Sequence[Any]) -> dict[Any, Any]:
      return {**held, **dict(zip(carried, carry))}

    return lax.while_loop(
      lambda carry: test.run(with_carry(carry))[0],
      lambda carry: step.run(with_carry(carry)),
      [held[place] for place in carried],
    )

  def once(
    self, programs: Sequence[Program], operands: Sequence[Any], *values: Any
  ) -> Iterator[tuple[Any, Any]]:
    """Yields each result of one run of each program, fused and as the function has it.

    Args:
      programs: those of the equation.
      operands: the values that the equation reads.
      *values: the inputs of the instruction, as for `run`.
    """
    held = dict(zip([*self.moving, *self.stored], values))
    for each, program in zip(self.bodies, programs, strict=True):
      given = [operands[place] for place in each.body.places]
      wanted = interpret(program, given, lambda one, x: one.run(*x), constant_array)
      yield from zip(each.run(held), wanted)

  def _carried(self) -> tuple[int, int]:
    """Returns the places of the operands that a loop carries, as first and end."""
    body = self.bodies[-1].body
    places = [body.places[each] for each in body.carried]
    return (places[0], places[-1] + 1) if places else (0, 0)

  def _scan(self, held: Mapping[Any, Any]) -> Sequence[Any]:
    params, (body,), (first, end) = self.equation.params, self.bodies, self._carried()
    rows = {place: held[place] for place in body.moving if place in body.body.mapped}
    stacked = {name: held[body.stored[name]] for name in body.mapped}

    def step(carry: Sequence[Any], each: tuple[dict[int, Any], dict[str, Any]]):
      results = body.run({**held, **dict(zip(range(first, end), carry)), **each[0]}, each[1])
      return results[: len(carry)], results[len(carry) :]

    carry, outputs = lax.scan(
      step,
      [held[place] for place in range(first, end)],
      (rows, stacked),
      length=params["length"],
      reverse=params["reverse"],
      unroll=params["unroll"],
    )
    return [*carry, *outputs]
