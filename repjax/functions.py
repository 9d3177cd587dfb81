"""Models of any library as functions of parameters and of images.

A model of repjax or of Flax Linen is a module. Everything else that computes something from images
comes here as a function `function(params, images)`, or as what `repjax.fuse` returned for one.

  module      Linen: `module.apply(variables, images)`, in evaluation
  function    NNX, Equinox, Haiku, plain JAX: `function(params, images)`
  fused       `fused(fused.fold(params), images)`
"""

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repjax.errors import InputError, listed, printable
from repjax.fusion import Fused, checks, fuse
from repjax.fusion.checks import INFERENCE_MODE
from repjax.fusion.modules import check_params, traced
from repjax.program import Program, inner_programs, trace

Function = Callable[[Any, Any], Any]
"""A pure function of a tree of parameters and of images."""


def name_of(model: Any) -> str:
  """Returns the name of a model for messages: of its class, or of the function."""
  while isinstance(model, functools.partial):
    model = model.func
  owner = getattr(model, "__self__", model)  # the module of a bound method such as `apply`
  name = getattr(owner, "__name__", type(owner).__name__)
  return "the function" if name == "<lambda>" else name


def check_results(results: Any, images: Any) -> Any:
  """Returns the results of a model, which must have a row for each image.

  Args:
    results: a tree of arrays.
    images: (N, H, W, C), the images that they were computed from.

  Raises:
    InputError: an array has a different number of rows.
  """
  results = jax.tree.map(jnp.asarray, results)
  odd = [leaf.shape for leaf in jax.tree.leaves(results) if leaf.shape[:1] != images.shape[:1]]
  if odd or not jax.tree.leaves(results):
    raise InputError(
      f"a model must return arrays with one row for each image, and returned {listed(odd, 3)} for "
      f"images {images.shape}. Return the results of the images alone, with the batch as the first "
      "axis, as by jax.vmap"
      if odd
      else "a model must return arrays with one row for each image, and this one returned none"
    )
  return results


def check_dtype(function: Any, params: Any, dtype: np.dtype, size: tuple[int, int]) -> None:
  """Checks that a function can be traced, and that it computes in a dtype or a narrower one.

  Args:
    function: takes parameters and images.
    params: its parameters, as arrays or as shapes, in this dtype where they are floating-point.
    dtype: dtype of the images.
    size: (height, width).

  Raises:
    InputError: the program depends on the values of the images or parameters, or its products are
      computed in a wider dtype.
  """
  if wide := _wider(function, params, dtype, size):
    raise InputError(
      f"{name_of(function)} computes in {wide} although its parameters and images are {dtype}. "
      f"Build its layers for {dtype}, or leave dtype out"
    )


def _wider(function: Any, params: Any, dtype: np.dtype, size: tuple[int, int]) -> np.dtype | None:
  """Returns a dtype wider than the images' in which a function computes products, if there is one.

  The arguments are those of `check_dtype`.
  """
  program = traced("repjax", function, params, jax.ShapeDtypeStruct((1, *size, 3), dtype))
  return next((found for found in _dtypes(program) if found.itemsize > dtype.itemsize), None)


def reason_of_training(program: Program) -> str | None:
  """Returns how a model shows that it is in training mode, None if it does not.

  Args:
    program: the traced model, whose last input are the images.
  """
  return checks.reason_of_training(program.equations, program.inputs[-1:])


def warn_of_training(function: Function, params: Any, images: jax.ShapeDtypeStruct) -> None:
  """Warns about a function that is in training mode.

  Args:
    function: takes parameters and images.
    params: its parameters, as arrays or as shapes.
    images: the shape and dtype of the images.
  """
  if reason := reason_of_training(trace(function, params, images)):
    warnings.warn(
      f"the exported function {reason}. Its result for an image then depends on other images, or "
      f"on numbers that were drawn. Export {INFERENCE_MODE}",
      stacklevel=3,
    )


def _dtypes(program: Program) -> Iterator[np.dtype]:
  """Yields the floating-point dtype of each operand of each product."""
  for equation in program.equations:
    if equation.primitive in ("conv_general_dilated", "dot_general"):
      dtypes = [operand.aval.dtype for operand in equation.inputs]
      yield from (dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating))
    for inner in inner_programs(equation):
      yield from _dtypes(inner)


def check_fused(fused: Fused, folded: Any, dtype: np.dtype, size: tuple[int, int]) -> None:
  """Checks that a fused function takes images of a dtype, and plans it for their size.

  Args:
    fused: what `repjax.fuse` returned.
    folded: what its `fold` returned.
    dtype: dtype of the images.
    size: (height, width).

  Raises:
    InputError: the function takes something else than images, or images of a different dtype; or
      it cannot take this size with the parameters that it folds; or the parameters are not its own.
  """
  taken = fused.arguments
  if len(taken) != 1 or len(taken[0].shape) != 4:
    raise InputError(
      "a fused function must take images (N, H, W, 3) alone here, and this one was made for "
      f"{listed((tuple(each.shape) for each in taken), 3)}. Bind other arguments with "
      "functools.partial before repjax.fuse, and let the function take a batch of images"
    )
  if taken[0].dtype != dtype:
    raise InputError(
      f"this fused function takes images of {taken[0].dtype}, and was asked to compute in {dtype}. "
      f"Pass dtype={taken[0].dtype.name!r}, or call repjax.fuse with images of {dtype}"
    )
  check_params(folded)
  jax.eval_shape(fused, folded, jax.ShapeDtypeStruct((1, *size, 3), dtype))


def fused(
  function: Function, params: Any, size: tuple[int, int], dtype: np.dtype, model: Any
) -> Fused | None:
  """Fuses a function of images and says in one line what merged.

  Args:
    function: takes parameters and images.
    params: its parameters, as arrays.
    size: (height, width).
    dtype: dtype of the images.
    model: the model, for its name.

  Returns:
    The fused function. None if nothing merges, or if some products are computed in a wider dtype:
    their parameters are rounded to `dtype` first, and a fold would not round them.

  Raises:
    InputError: the function cannot be traced, or `fuse` finds that it made a mistake.
  """
  if wide := _wider(function, params, dtype, size):
    say(f"{name_of(model)}: not fused, since parts of it compute in {wide} and not in {dtype}")
    return None
  try:
    made = fuse(function, params, jax.ShapeDtypeStruct((1, *size, 3), dtype))
  except InputError as error:
    raise InputError(f"{error}. Pass fuse=False to leave the whole model as it is") from error
  report = made.report
  if not report.merges:
    return None
  operations = sum(merge.operations for merge in report.merges)
  say(
    f"{name_of(model)}: {operations:,} operations merged into {len(report.merges):,}, "
    f"{report.before.products:,} -> {report.after.products:,} convolutions and matrix products, "
    f"{len(report.norms):,} norms left; fuse=False leaves all as it is"
  )
  # Batches of other sizes differ from one image in the number of rows alone.
  return made.without_checks()


def say(line: str) -> None:
  """Prints a line for the user on stderr."""
  print(printable(line), file=sys.stderr, flush=True)
