"""Checks of a plan: each merge against the equations that it replaces, on random numbers."""

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repjax.algebra import wide_dtype
from repjax.errors import InputError
from repjax.fusion.expressions import Expression, evaluate
from repjax.fusion.plan import Instruction, Plan, constant_array
from repjax.program import Constant, Equation, Variable

_TOLERANCE = {8: 1e-9, 4: 1e-3, 2: 0.1}
"""Largest relative error of a merge, by the bytes of a number. Mistakes make errors near 1."""

_KEYS = {"fry": "threefry2x32", "rbg": "rbg", "urbg": "unsafe_rbg"}
"""The generators of JAX, by the names that dtypes of keys have."""


def random_array(aval: Any, seed: int) -> Any:
  """Returns random numbers that keep the numbers of a network moderate.

  Vectors are positive, since a variance may be among them. Kernels get smaller with their fan-in.
  """
  rng = np.random.default_rng(seed)
  if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
    kind = _KEYS[str(aval.dtype).removeprefix("key<").removesuffix(">")]
    count = max(1, math.prod(aval.shape))
    return jax.random.split(jax.random.key(seed, impl=kind), count).reshape(aval.shape)
  if aval.dtype == np.uint8:
    return jnp.asarray(rng.integers(0, 256, aval.shape), aval.dtype)
  if not jnp.issubdtype(aval.dtype, jnp.inexact):
    return jnp.asarray(rng.integers(0, 2, aval.shape), aval.dtype)
  if len(aval.shape) < 2:
    return jnp.asarray(rng.uniform(0.5, 1.5, aval.shape), aval.dtype)
  fan_in = max(1, math.prod(aval.shape) // max(1, *aval.shape))
  return jnp.asarray(rng.normal(size=aval.shape) / math.sqrt(fan_in), aval.dtype)


def check(plan: Plan, equations: Sequence[Equation]) -> None:
  """Compares each merge with the equations that it replaces, from the same values.

  Args:
    plan: to be checked.
    equations: those of the traced program, in order.

  Raises:
    InputError: a merge computes something different. The text names its parameters.
  """
  made = {output for each in equations for output in each.outputs}
  merges = {
    each.outputs[0]: each for each in plan.instructions if each.merged and each.outputs[0] in made
  }
  if not merges:
    return
  found = _measured(plan, equations, merges)
  names = {expression: name for name, expression in plan.stored.items()}
  for error, merge in zip(found, merges.values()):
    if not error <= _tolerance(merge):
      read = [names[each] for each in merge.inputs if each in names]
      raise InputError(
        f"fuse made a mistake in the scope {merge.scope!r}: on random parameters the merged layer "
        f"differs from the function by {error:.1e} of the largest value, from the parameters "
        f"{', '.join(read)}. Please report the function, and leave this part out of `fuse`"
      )


def _tolerance(merge: Instruction) -> float:
  """Returns the largest error of a merge by the narrowest dtype that it computes in."""
  avals = [each.aval for each in (*merge.inputs, *merge.outputs)]
  sizes = [aval.dtype.itemsize for aval in avals if jnp.issubdtype(aval.dtype, jnp.floating)]
  return _TOLERANCE.get(min(sizes, default=4), 0.1)


def _measured(
  plan: Plan, equations: Sequence[Equation], merges: Mapping[Variable, Instruction]
) -> list[float]:
  """Returns the relative error of each merge on random numbers."""
  shapes = [jax.ShapeDtypeStruct(each.aval.shape, each.aval.dtype) for each in plan.program.inputs]
  errors = jax.jit(
    lambda *inputs: _errors(plan, equations, merges, inputs),
    # The program runs once, so that compiling it well would cost more than it gives.
    compiler_options={"xla_backend_optimization_level": 0},
  )
  with jax.default_matmul_precision("highest"):
    compiled = errors.lower(*shapes).compile()
  with jax.ensure_compile_time_eval():  # a call may be traced, and the check is not
    inputs = [random_array(each, seed) for seed, each in enumerate(shapes)]
    return [float(error) for error in compiled(*inputs)]


def _errors(
  plan: Plan,
  equations: Sequence[Equation],
  merges: Mapping[Variable, Instruction],
  inputs: Sequence[Any],
):
  """Returns the relative error of each merge, in order."""
  values: dict[Any, Any] = dict(zip(plan.program.inputs, inputs))
  leaves = [
    None if variable in plan.arguments else array
    for variable, array in zip(plan.program.inputs, inputs)
  ]
  stored = [
    each for merge in merges.values() for each in merge.inputs if isinstance(each, Expression)
  ]
  values.update(zip(stored, evaluate(stored, leaves)))
  makers = {each.outputs[0]: each for each in plan.instructions if each.outputs}
  found = {}
  for equation in equations:
    results = equation.run(*(_read(values, each) for each in equation.inputs))
    values.update(zip(equation.outputs, results))
    merge = merges.get(equation.outputs[0]) if equation.outputs else None
    if merge is not None:
      for each in merge.inputs:
        if isinstance(each, Variable) and each not in values:  # picked pixels of a value
          maker = makers[each]
          values.update(zip(maker.outputs, maker.step.run(values[maker.inputs[0]])))
      made = merge.step.run(*(_read(values, each) for each in merge.inputs))
      errors = [relative_error(mine, wanted) for mine, wanted in zip(made, results)]
      found[equation.outputs[0]] = jnp.max(jnp.stack(errors))
  return [found[variable] for variable in merges]


def _read(values: Mapping[Any, Any], given: Any) -> Any:
  return constant_array(given) if isinstance(given, Constant) else values[given]


def relative_error(result: Any, wanted: Any) -> Any:
  """Returns max|a - b| / max|b|, over all places where b is finite."""
  wide = wide_dtype(wanted.dtype)
  result, wanted = result.astype(wide), wanted.astype(wide)
  finite = jnp.isfinite(wanted)
  zero = jnp.zeros((), wide)
  difference = jnp.max(jnp.where(finite, jnp.abs(result - wanted), zero), initial=0)
  return difference / jnp.maximum(
    jnp.max(jnp.where(finite, jnp.abs(wanted), zero), initial=0), jnp.finfo(wide).tiny
  )


def reason_of_training(equations: Sequence[Equation], moving: Container[Any]) -> str | None:
  """Returns how a program shows that it is in training mode, None if it does not.

  Args:
    equations: of the traced program.
    moving: the variables that depend on the arguments.
  """
  if any(each.primitive.startswith(_RANDOM) for each in equations):
    return "draws random numbers, as dropout does"
  statistics: dict[Any, int] = {}  # variables that follow from statistics, with their sizes
  for each in equations:
    size = math.prod(each.outputs[0].aval.shape) if each.outputs else 0
    if _is_statistic(each, moving) or any(statistics.get(given) == size for given in each.inputs):
      statistics.update(dict.fromkeys(each.outputs, size))
      if each.primitive in ("rsqrt", "sqrt"):
        return "divides by the deviation of its batch, as a batch norm in training does"
  return None


_RANDOM = ("random_", "threefry", "rng_")


def _is_statistic(equation: Equation, moving: Container[Any]) -> bool:
  """Checks for a sum over all axes besides the channels, the batch included."""
  if equation.primitive != "reduce_sum" or equation.inputs[0] not in moving:
    return False
  rank, axes = len(equation.inputs[0].aval.shape), equation.params["axes"]
  return rank >= 2 and 0 in axes and len(axes) == rank - 1
