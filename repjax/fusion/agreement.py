"""Plans for several shapes: do they fold the same parameters?"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from repjax.fusion.checks import random_array
from repjax.fusion.expressions import evaluate
from repjax.fusion.plan import Plan
from repjax.program import Equation


def differing(first: Plan, second: Plan, avals: Sequence[Any]) -> list[str]:
  """Returns the names of stored arrays that two plans do not fold in the same way.

  Plans share a table of expressions, so that equal folds are the same object. Where two folds of
  one shape are written differently, they are compared on random parameters.

  Args:
    first, second: plans of one function.
    avals: shapes and dtypes of the parameters.
  """
  one, two = first.stored, second.stored
  names = [name for name in {**one, **two} if one.get(name) is not two.get(name)]
  lost = [name for name in names if name not in one or name not in two]
  lost += [
    name
    for name in names
    if name not in lost and (one[name].shape, one[name].dtype) != (two[name].shape, two[name].dtype)
  ]
  rest = [name for name in names if name not in lost]
  if not rest:
    return lost
  with jax.ensure_compile_time_eval():
    leaves = [random_array(aval, seed) for seed, aval in enumerate(avals)]
    ours = evaluate([one[name] for name in rest], leaves)
    theirs = evaluate([two[name] for name in rest], leaves)
    return lost + [name for name, a, b in zip(rest, ours, theirs) if not _close(a, b)]


def _close(first: Any, second: Any) -> bool:
  first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
  return bool(np.allclose(first, second, rtol=1e-4, atol=1e-5 * np.abs(first).max(initial=0)))


def kept_apart(plan: Plan, equations: Sequence[Equation], names: Iterable[str]) -> frozenset[int]:
  """Returns the places of the equations whose merges read some of the stored arrays."""
  stored = {plan.stored[name] for name in names if name in plan.stored}
  outputs = {
    instruction.outputs[0]
    for instruction in plan.instructions
    if instruction.merged and stored & {*instruction.inputs}  # type: ignore[arg-type]
  }
  return frozenset(
    place for place, equation in enumerate(equations) if outputs & {*equation.outputs}
  )
