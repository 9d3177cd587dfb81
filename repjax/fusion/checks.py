"""Checks of plans, on random numbers: merges against equations, and plans against each other."""

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from repjax.algebra import wide_dtype
from repjax.errors import InputError
from repjax.fusion.bodies import FusedBodies, bodies_of
from repjax.fusion.expressions import evaluate
from repjax.fusion.plan import Instruction, Plan, read
from repjax.program import Constant, Equation, inner_programs, place_of
from repjax.trees import generator_of, is_key
from repjax.xla import safe_options

_TOLERANCE = {8: 1e-9, 4: 1e-3, 2: 0.1, 1: 0.5}
"""Largest relative error of a merge, by the bytes of a number. Mistakes make errors near 1."""


def random_array(aval: Any, seed: int, positive: bool = False) -> Any:
  """Returns random numbers that keep the numbers of a network moderate.

  Vectors are positive, since a variance may be among them. Kernels get smaller with their fan-in.

  Args:
    aval: shape and dtype.
    seed: of the random numbers.
    positive: make all numbers positive, kernels included.
  """
  rng = np.random.default_rng(seed)
  if is_key(aval):
    count = math.prod(aval.shape)
    return jax.random.split(jax.random.key(seed, impl=generator_of(aval)), count).reshape(
      aval.shape
    )
  if aval.dtype == np.uint8:
    return jnp.asarray(rng.integers(0, 256, aval.shape), aval.dtype)
  if not jnp.issubdtype(aval.dtype, jnp.inexact):
    return jnp.asarray(rng.integers(0, 2, aval.shape), aval.dtype)
  if len(aval.shape) < 2:
    return jnp.asarray(rng.uniform(0.5, 1.5, aval.shape), aval.dtype)
  fan_in = max(1, math.prod(aval.shape) // max(1, *aval.shape))
  numbers = rng.normal(size=aval.shape) / math.sqrt(fan_in)
  # Sums of positive numbers do not cancel, and would grow from layer to layer.
  return jnp.asarray(np.abs(numbers) / math.sqrt(fan_in) if positive else numbers, aval.dtype)


def check(plan: Plan, equations: Sequence[Equation], exact: Sequence[Equation]) -> None:
  """Compares each merge with the equations that it replaces, from the same values.

  Calls of the host, such as prints, do not happen. A `while_loop` may never end on random numbers,
  so that its programs are compared once. Loops that hold either are not compared.

  Args:
    plan: to be checked.
    equations: those of the traced program, in order.
    exact: the same equations, with products of full precision.

  Raises:
    InputError: a merge computes something different, and the text names its parameters; or there
      are no numbers to compare on.
  """
  made = {output for each in equations for output in each.outputs}
  merges = [each for each in plan.instructions if each.merged and _is_comparable(each, made)]
  if not merges:
    return
  _check_known(plan, equations)
  steps = {each.outputs[0]: each for each in plan.instructions if each.merged}
  makers = {output: each for each in equations for output in each.outputs}
  names = {expression: name for name, expression in plan.stored.items()}
  for error, merge in zip(_measured(plan, equations, exact, merges), merges):
    inputs = _inputs(merge, steps, made)
    if error > _tolerance([*_passed(merge, inputs, makers)]):
      parameters = [names[each] for each in inputs if each in names]
      raise InputError(
        f"fuse made a mistake {place_of(merge.scope)}: on random parameters the merged layer "
        f"differs from the function by {error:.1e} of the largest value, from the parameters "
        f"{', '.join(parameters)}. Please report the function, and leave this part out of `fuse`"
      )


def _check_known(plan: Plan, equations: Sequence[Equation]) -> None:
  """Raises InputError if sizes or numbers are not known while a plan is made."""
  sizes = [size for each in plan.program.inputs for size in each.aval.shape]
  if not all(isinstance(size, int) for size in sizes):
    raise InputError(
      "fuse cannot check a call whose sizes are symbols, as of jax.export. Export "
      "fused.without_checks() instead; the sizes that fuse was called with are checked already"
    )
  operands = [each for equation in equations for each in equation.inputs]
  if any(isinstance(each, Constant) and isinstance(each.array, Tracer) for each in operands):
    raise InputError(
      "fuse cannot check a function that holds traced arrays, as of a jax.jit or jax.grad around "
      "fuse. Pass these arrays as parameters, or set check=False"
    )


def _ends(equation: Equation) -> bool:
  """Tells if an equation ends on any numbers, and does nothing on the host."""
  if equation.primitive in ("debug_print", "while") or "callback" in equation.primitive:
    return False
  return all(_ends(each) for held in inner_programs(equation) for each in held.equations)


def _is_comparable(instruction: Instruction, made: Container[Any]) -> bool:
  """Tells if a merge makes a value of the program that random numbers can be compared on."""
  step = instruction.step
  if instruction.outputs[0] not in made:
    return False
  if not isinstance(step, FusedBodies) or _ends(step.equation):
    return True
  inside = [each for body in step.bodies for each in body.body.program.equations]
  return step.equation.primitive == "while" and all(map(_ends, inside))


def _inputs(merge: Instruction, steps: Mapping[Any, Instruction], made: Container[Any]) -> list:
  """Returns what an instruction reads, and what makes each value that the program lacks reads."""
  inputs = []
  for each in merge.inputs:
    inputs += _inputs(steps[each], steps, made) if each in steps and each not in made else [each]
  return inputs


def _passed(
  merge: Instruction, inputs: Sequence[Any], makers: Mapping[Any, Equation]
) -> Iterator[Any]:
  """Yields all values of the program that a merge stands for, from its inputs to its outputs.

  Parameters are followed back to the arguments of the function, since the program may round them.
  """
  seen: set[Any] = set()
  rest = [*inputs, *merge.outputs]
  while rest:
    each = rest.pop()
    if each in seen:
      continue
    seen.add(each)
    yield each
    if each in makers and each not in inputs:
      rest += makers[each].inputs
      for inner in inner_programs(makers[each]):
        yield from (output for equation in inner.equations for output in equation.outputs)


def _tolerance(values: Sequence[Any]) -> float:
  """Returns the largest error of a merge by the narrowest dtype of the values."""
  dtypes = [each.aval.dtype for each in values]
  sizes = [dtype.itemsize for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
  return _TOLERANCE[min(sizes, default=4)]


def _measured(
  plan: Plan,
  equations: Sequence[Equation],
  exact: Sequence[Equation],
  merges: Sequence[Instruction],
) -> list[float]:
  """Returns the relative error of each merge on random numbers.

  The program may turn some numbers into NaN, as the root of a negative variance is. Where a value
  is NaN as a whole, the error on positive numbers counts.
  """
  pairs = list(zip(equations, exact, strict=True))
  # The results of equations that are not run are random numbers too.
  drawn = [each for equation in equations if not _ends(equation) for each in equation.outputs]
  variables = [*plan.program.inputs, *drawn]
  shapes = [jax.ShapeDtypeStruct(each.aval.shape, each.aval.dtype) for each in variables]
  errors = jax.jit(
    lambda *inputs: _errors(plan, pairs, merges, dict(zip(variables, inputs))),
    compiler_options={
      # The program runs once, so that compiling it well would cost more than it gives.
      "xla_backend_optimization_level": 0,
      **safe_options(jax.devices()[0], jnp.bfloat16),
    },
  )
  with jax.default_matmul_precision("highest"):
    compiled = errors.lower(*shapes).compile()

  def errors_on(positive: bool) -> list[float]:
    inputs = [random_array(each, seed, positive) for seed, each in enumerate(shapes)]
    return [float(error) for error in compiled(*inputs)]

  with jax.ensure_compile_time_eval():  # a call may be traced, and the check is not
    found = errors_on(positive=False)
    return list(np.fmax(found, errors_on(positive=True))) if np.isnan(found).any() else found


def _errors(
  plan: Plan,
  equations: Sequence[tuple[Equation, Equation]],
  merges: Sequence[Instruction],
  values: dict[Any, Any],
) -> list[Any]:
  """Returns the relative error of each merge, in order.

  Args:
    plan: the plan.
    equations: those of the program, each with the same one of full precision.
    merges: what is compared.
    values: the inputs of the program, and the results of equations that are not run.
  """
  leaves = [
    None if variable in plan.arguments else values[variable] for variable in plan.program.inputs
  ]
  values.update(zip(plan.stored.values(), plan.fold(leaves).values()))
  values.update(plan.constants)
  for equation, same in equations:
    if _ends(equation):
      results = same.run(*(read(values, each) for each in equation.inputs))
      values.update(zip(equation.outputs, results))
  precise = dict(equations)
  # Values that the program does not have, such as picked pixels, follow from those that it has.
  errors = []
  for each in plan.instructions:
    if not each.merged or (each not in merges and each.outputs[0] in values):
      continue
    step, inputs = each.step, [read(values, given) for given in each.inputs]
    if each not in merges:
      values.update(zip(each.outputs, step.run(*inputs)))
    elif isinstance(step, FusedBodies) and not _ends(step.equation):
      operands = [read(values, given) for given in step.equation.inputs]
      programs = [body.program for body in bodies_of(precise[step.equation])]
      errors.append(_largest_error(step.once(programs, operands, *inputs)))
    else:
      wanted = [values[output] for output in each.outputs]
      errors.append(_largest_error(zip(step.run(*inputs), wanted)))
  return errors


def _largest_error(pairs: Iterable[tuple[Any, Any]]) -> Any:
  """Returns the largest relative error of pairs of floating-point arrays.

  Whole numbers are left out, since one that a comparison chooses may differ by rounding.
  """
  errors = [
    relative_error(mine, wanted)
    for mine, wanted in pairs
    if jnp.issubdtype(wanted.dtype, jnp.floating)
  ]
  return jnp.nanmax(jnp.stack(errors)) if errors else jnp.zeros(())


def relative_error(result: Any, wanted: Any) -> Any:
  """Returns max|a - b| / max|b|, over all places where b is finite.

  NaN if b is finite nowhere, and infinite if a is NaN where b is finite.
  """
  wide = wide_dtype(wanted.dtype)
  result, wanted = result.astype(wide), wanted.astype(wide)
  finite = jnp.isfinite(wanted)
  difference = jnp.abs(result - wanted)
  difference = jnp.where(jnp.isnan(difference), jnp.inf, difference)
  largest, scale = (
    jnp.max(jnp.where(finite, each, 0), initial=0) for each in (difference, jnp.abs(wanted))
  )
  return jnp.where(finite.any(), largest / jnp.maximum(scale, jnp.finfo(wide).tiny), jnp.nan)


INFERENCE_MODE = (
  "the function of inference mode: model.eval() before nnx.split in Flax NNX, train=False, "
  "use_running_average=True or deterministic=True in Linen, eqx.nn.inference_mode(model) in "
  "Equinox, is_training=False in Haiku"
)
"""What to pass in place of a function in training mode, for messages."""


def reason_of_training(equations: Sequence[Equation], arguments: Iterable[Any]) -> str | None:
  """Returns how a program shows that it is in training mode, None if it does not.

  Args:
    equations: of the traced program.
    arguments: the variables of its arguments. Statistics of parameters alone belong to inference
      too.
  """
  signs = {
    "draws random numbers, as dropout does in training": any(
      each.primitive.startswith(_DRAWS) for each in equations
    ),
    "divides by the deviation over its batch, as a batch norm does in training": (
      _divides_by_deviation(equations, arguments)
    ),
  }
  return ", and ".join(sign for sign, found in signs.items() if found) or None


def _divides_by_deviation(equations: Sequence[Equation], arguments: Iterable[Any]) -> bool:
  """Tells if a program takes the root of a statistic over all axes besides the channels."""
  moving = set(arguments)  # and all that follows from them
  statistics: dict[Any, int] = {}  # variables that follow from statistics, with their sizes
  for each in equations:
    if not moving.isdisjoint(each.inputs):
      moving.update(each.outputs)
    size = math.prod(each.outputs[0].aval.shape) if each.outputs else 0
    if _is_statistic(each, moving) or any(statistics.get(given) == size for given in each.inputs):
      statistics.update(dict.fromkeys(each.outputs, size))
      if each.primitive in ("rsqrt", "sqrt"):
        return True
  return False


def draws(equation: Equation) -> bool:
  """Tells if an equation draws random numbers, or random keys from a key."""
  return equation.primitive.startswith((*_DRAWS, *_KEYS))


_DRAWS = ("random_bits", "random_gamma", "threefry", "rng_")
# Keys that come from a key. In inference mode a model may prepare them and draw nothing from them.
_KEYS = ("random_split", "random_fold_in")


def _is_statistic(equation: Equation, moving: Container[Any]) -> bool:
  """Checks for a sum over all axes besides the channels, the batch included.

  A collective over an axis of `jax.vmap`, as in the batch norm of Equinox, is such a sum too.
  """
  if equation.primitive not in ("reduce_sum", "psum") or equation.inputs[0] not in moving:
    return False
  rank, axes = len(equation.inputs[0].aval.shape), equation.params["axes"]
  return rank >= 2 and 0 in axes and len(axes) == rank - 1


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
  if one[rest[0]].table.traced:
    return names  # their numbers are not known yet
  with jax.ensure_compile_time_eval():
    leaves = [random_array(aval, seed) for seed, aval in enumerate(avals)]
    ours = evaluate([one[name] for name in rest], leaves)
    theirs = evaluate([two[name] for name in rest], leaves)
    return lost + [name for name, a, b in zip(rest, ours, theirs) if not _close(a, b)]


def _close(first: Any, second: Any) -> bool:
  first, second = (
    np.asarray(jax.random.key_data(each) if is_key(each) else each, np.complex128)
    for each in (first, second)
  )
  return bool(np.allclose(first, second, rtol=1e-4, atol=1e-5 * np.abs(first).max(initial=0)))


def kept_apart(plan: Plan, equations: Sequence[Equation], names: Iterable[str]) -> frozenset[int]:
  """Returns the places of the equations whose merges read some of the stored arrays."""
  made = {output for each in equations for output in each.outputs}
  reached: set[Any] = {plan.stored[name] for name in names if name in plan.stored}
  outputs = set()
  for each in plan.instructions:
    if each.merged and reached & {*each.inputs}:
      outputs |= {*each.outputs} & made
      reached |= {*each.outputs} - made  # values that the program does not have
  return frozenset(
    place for place, equation in enumerate(equations) if outputs & {*equation.outputs}
  )
