"""A plan: the fold, which computes stored arrays from parameters, and the instructions after it.

Instructions work on the variables of the traced program. An instruction is an equation of the
program as it was, or a merge, which computes one of the program's variables in a different way.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from repjax.fusion.expressions import Expression, evaluate
from repjax.program import Constant, Equation, Program, Variable, constant_array

Input = Variable | Expression | Constant


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
  """One step of a fused program.

  Attributes:
    step: an equation of the traced program, or what takes the place of equations. Its method `run`
      computes the outputs from the values of the inputs.
    inputs: variables, stored expressions and constants.
    outputs: variables of the traced program.
    scope: the name stack.
    effects: the step does something besides its outputs, such as printing.
  """

  step: Any
  inputs: tuple[Input, ...]
  outputs: tuple[Variable, ...]
  scope: str = ""
  effects: bool = False

  @property
  def merged(self) -> bool:
    """Tells if the step is not an equation of the traced program."""
    return not isinstance(self.step, Equation)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """A function for arguments of certain shapes, in two parts.

  Attributes:
    program: the traced program.
    arguments: the inputs of the program that are no parameters, in order.
    instructions: what a call computes.
    outputs: the leaves of the result.
    stored: the arrays that the fold makes, by name.
    constants: arrays that depend on no parameter, computed once.
  """

  program: Program
  arguments: tuple[Variable, ...]
  instructions: tuple[Instruction, ...]
  outputs: tuple[Input, ...]
  stored: Mapping[str, Expression]
  constants: Mapping[Expression, Any]

  def fold(self, leaves: Sequence[Any]) -> dict[str, Any]:
    """Computes the stored arrays from the leaves of the parameter tree."""
    return dict(zip(self.stored, evaluate(self.stored.values(), leaves)))

  def call(self, held: Mapping[str, Any], arguments: Sequence[Any]) -> list[Any]:
    """Computes the leaves of the result from stored arrays and the leaves of the arguments."""
    values: dict[Any, Any] = dict(zip(self.arguments, arguments))
    values.update(self.constants)
    values.update((expression, held[name]) for name, expression in self.stored.items())
    last = _last_readers(self.instructions)
    for instruction in self.instructions:
      with jax.named_scope(instruction.scope):
        results = instruction.step.run(*(read(values, each) for each in instruction.inputs))
      values.update(zip(instruction.outputs, results))
      for each in last.get(instruction, ()):
        if each not in self.outputs:
          values.pop(each, None)  # as JAX would free it, where calls are not compiled
    return [_as_jax(read(values, each)) for each in self.outputs]


def read(values: Mapping[Any, Any], given: Input) -> Any:
  """Returns the array of an input, among the arrays that are known."""
  return constant_array(given) if isinstance(given, Constant) else values[given]


def _as_jax(value: Any) -> Any:
  """Returns a result as an array of JAX. Constants of the program may be arrays of NumPy."""
  return jnp.asarray(value) if isinstance(value, np.ndarray) else value


def _last_readers(instructions: Sequence[Instruction]) -> dict[Instruction, list[Variable]]:
  """Returns for each instruction the variables that no later instruction reads."""
  seen, last = set(), {}
  for instruction in reversed(instructions):
    variables = {each for each in instruction.inputs if isinstance(each, Variable)}
    last[instruction] = list(variables - seen)
    seen |= variables
  return last


def has_effects(equation: Equation) -> bool:
  """Checks if an equation does something besides computing its outputs."""
  return bool(equation.source.effects)


T = TypeVar("T", Equation, Instruction)


def live(steps: Sequence[T], outputs: Sequence[Any], effects: Callable[[T], bool]) -> list[T]:
  """Returns the equations or instructions that the outputs need, or that have effects."""
  needed, kept = set(outputs), []
  for each in reversed(steps):
    if effects(each) or any(output in needed for output in each.outputs):
      kept.append(each)
      needed.update(each.inputs)
  return kept[::-1]


def named(
  expressions: Sequence[Expression],
  hints: Mapping[Expression, tuple[Expression, str]],
  paths: Mapping[int, str],
  sizes: Mapping[int, int],
) -> dict[str, Expression]:
  """Names what a fold stores after the largest parameter that a stored array depends on.

  Args:
    expressions: the stored arrays.
    hints: for what merges store, the kernel of the merge and the kind, such as "bias".
    paths: names of all parameters.
    sizes: number of elements of all parameters.

  Returns:
    Expressions by name. A name that is taken gets "~2" at its end, and so on.
  """
  names: dict[str, Expression] = {}
  for expression in expressions:
    kernel, kind = hints.get(expression, (expression, ""))
    leaves = kernel.leaves or expression.leaves
    path = paths[max(leaves, key=lambda leaf: (sizes[leaf], leaf))]
    if kind and kind != "kernel":
      path = "/".join([*path.split("/")[:-1], kind])
    name, number = path, 1
    while name in names:  # a parameter may itself have a name with "~2" at its end
      name, number = f"{path}~{number + 1}", number + 1
    names[name] = expression
  return names
