"""Checks of functions, their parameters and arguments: what cannot be used is refused in words."""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repjax.errors import InputError, listed, printable, sentences
from repjax.program import Program, trace, traceable
from repjax.trees import leaf_name

_WAYS = {
  "flax.linen": ("Module", "pass model.apply with the variables that model.init returned"),
  "flax.nnx": (
    "Module",
    "graph, state = nnx.split(model), and pass lambda state, images: nnx.merge(graph, state)"
    "(images) with the state",
  ),
  "equinox": (
    "Module",
    "params, static = eqx.partition(model, eqx.is_array), and pass lambda params, images: "
    "jax.vmap(eqx.combine(params, static))(images) with the params",
  ),
}
"""Libraries whose modules are no functions of parameters: the class, and a function to pass."""


def _library_of(model: Any) -> str | None:
  """Returns the library whose module something is, None if it is no module."""
  for package, (name, _) in _WAYS.items():
    base = getattr(sys.modules.get(package), name, None)
    if base is not None and isinstance(model, base) and not _is_wrapper(model):
      return package
  return None


def _is_wrapper(model: Any) -> bool:
  """Tells if a module of Equinox wraps a function, as `eqx.filter_jit` does."""
  home = type(model).__module__
  return home.startswith("equinox.") and not home.startswith("equinox.nn")


def check_callable(
  model: Any,
  wanted: str = "a Flax Linen module, a function(params, images) or what repjax.fuse returns",
) -> None:
  """Checks that a model is a function of parameters and of arguments.

  Args:
    model: what was passed as a function.
    wanted: what may be passed, for the message.

  Raises:
    InputError: it is a module, or nothing that can be called.
  """
  library = _library_of(model)
  if library:
    raise InputError(
      f"{type(model).__name__} is a module of {library}, and not a function of its parameters. A "
      f"function of parameters and images is wanted: {_WAYS[library][1]}"
    )
  if not callable(model):
    raise InputError(
      f"a model is {wanted}, got {printable(type(model).__name__)}. Wrap it as such a function, in "
      "inference mode"
    )


def is_array(leaf: Any) -> bool:
  """Tells if a leaf is an array of a dtype of JAX, a shape and dtype, or a number of Python."""
  if isinstance(leaf, int | float | complex):
    return True
  # Modules may have one of the two attributes.
  return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and _is_of_jax(leaf.dtype)


def _is_of_jax(dtype: Any) -> bool:
  """Tells if JAX computes in a dtype. NumPy has texts, objects, dates and wider numbers besides."""
  try:
    known: Any = jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True)
  except (TypeError, ValueError):
    return False
  if jnp.issubdtype(known, jax.dtypes.extended):  # a random key
    return True
  widest = {np.bool_: 1, np.integer: 8, np.floating: 8, np.complexfloating: 16}
  return known.kind != "m" and any(  # NumPy counts differences of dates among the integers
    jnp.issubdtype(known, kind) and known.itemsize <= most for kind, most in widest.items()
  )


def shown(leaf: Any) -> str:
  """Returns a leaf of a tree for a message: dtype and shape of an array, else its `repr`."""
  if isinstance(leaf, np.ndarray):
    return f"an array of {printable(leaf.dtype, 40)} {leaf.shape}"
  return printable(repr(leaf), 80)


def check_params(params: Any, *, or_shapes: bool = False) -> None:
  """Checks that the parameters of a function are a tree of arrays.

  Args:
    params: the parameters.
    or_shapes: shapes without numbers are taken too.

  Raises:
    InputError: a leaf is something else.
  """
  paths = jax.tree_util.tree_leaves_with_path(params)
  odd = {
    leaf_name(path): leaf
    for path, leaf in paths
    if (isinstance(leaf, jax.ShapeDtypeStruct) and not or_shapes) or not is_array(leaf)
  }
  if odd:
    name, leaf = next(iter(odd.items()))
    place = printable(name or "the tree")
    more = f", and {listed(list(odd)[1:], 2)} are no arrays either" if len(odd) > 1 else ""
    library = next(_libraries_in(params), None)
    raise InputError(
      sentences(
        f"the parameters of a function must be a tree of arrays, but {place} "
        f"is {shown(leaf)}{more}",
        f"The tree holds a module of {library}: {_WAYS[library][1]}"
        if library
        else "Pass arrays of numbers here, and bind settings with functools.partial",
      )
    )


def traced(what: str, function: Callable[..., Any], params: Any, *args: Any) -> Program:
  """Traces a function of parameters and arguments, and says in one paragraph why that fails.

  Args:
    what: who traces, for the message.
    function: takes the parameters and the arguments.
    params: a tree of arrays, or of shapes and dtypes.
    *args: trees of the same.

  Returns:
    The program, whose inputs are the leaves of the parameters and of the arguments, in order.

  Raises:
    InputError: the function takes a different number of arguments, depends on their values, raises
      an error, or returns something else than arrays.
  """
  given, tree = jax.tree.flatten((params, args))

  def call(leaves: Any) -> Any:
    params, args = tree.unflatten(leaves)
    return _arrays_alone(function(params, *args))

  try:
    with traceable(what):
      return trace(call, given)
  except InputError:
    raise
  except Exception as error:  # A function of somebody may raise anything.
    if isinstance(error, TypeError) and (miscounted := _miscounted(function, args)):
      raise InputError(f"{what} {miscounted}") from error
    raised = f"{type(error).__name__}: {printable(str(error).partition(chr(10))[0], 300)}"
    raise InputError(
      sentences(
        f"{what} cannot trace this function, which raised {raised}",
        f"It was called with the parameters {_described(params)} and the arguments "
        f"{_described(args, named=False)}",
        _way_out(error, params, args),
      )
    ) from error


def _miscounted(function: Callable[..., Any], args: tuple[Any, ...]) -> str:
  """Returns what is wrong with the number of arguments of a call that failed, "" if nothing is."""
  try:
    signature = inspect.signature(function)
  except (TypeError, ValueError):  # some callables do not say
    return ""
  try:
    signature.bind(None, *args)
  except TypeError as error:
    number = "1 argument" if len(args) == 1 else f"{len(args)} arguments"
    return sentences(
      f"calls the function with its parameters and {number}, but the function takes "
      f"{printable(signature, 120)}: {error}",
      _WITH_SHAPES
      if any(map(_is_of_numbers, args))
      else "Pass all arguments by position, and bind the others with functools.partial",
    )
  return ""


def _arrays_alone(results: Any) -> Any:
  """Returns the results of a function, which must be arrays."""
  odd = [leaf for leaf in jax.tree.leaves(results) if not is_array(leaf)]
  if odd:
    raise InputError(
      f"a function must return arrays, or a tree of arrays, and this one returned "
      f"{shown(odd[0])}, of type {type(odd[0]).__name__}. Let it return arrays alone"
    )
  return results


def _described(tree: Any, *, named: bool = True) -> str:
  """Returns the dtypes and shapes of the leaves of a tree for a message, after their names."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  avals = [jax.eval_shape(jnp.asarray, leaf) for _, leaf in leaves]
  forms = [f"{aval.dtype}{list(aval.shape)}" for aval in avals]
  names = [f"{leaf_name(path)} " if named else "" for path, _ in leaves]
  return listed(map(str.__add__, names, forms), 4) or "(none)"


_WITH_SHAPES = (
  "An argument consists of whole numbers. For an array of a certain shape pass "
  "jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)"
)


def _way_out(error: Exception, params: Any, args: tuple[Any, ...]) -> str:
  """Returns what may be wrong with the parameters and arguments of a function that fails."""
  if any(map(_is_of_numbers, args)):
    return _WITH_SHAPES
  is_flat = isinstance(params, Mapping) and not any(isinstance(v, Mapping) for v in params.values())
  if is_flat and isinstance(error, LookupError | AttributeError):
    return (
      "Pass the parameters of this function. What `fold` returned belongs to the function that "
      "repjax.fuse returned"
    )
  if type(error).__name__ == "ScopeCollectionNotFound":
    return (
      "A module of Flax Linen takes all that model.init returned, the collections params and "
      "batch_stats among them"
    )
  if isinstance(error, TypeError) and "missing" in str(error) and "argument" in str(error):
    return "Bind further arguments with functools.partial, such as train=False"
  if any(map(_has_channels_first, jax.tree.leaves(args))):
    return (
      "The images have channels first, and most functions of JAX want them last, (N, H, W, C). "
      "Pass jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32), or images.transpose(0, 2, 3, 1)"
    )
  return "Pass parameters and arguments with which the function itself runs"


def _has_channels_first(argument: Any) -> bool:
  """Tells if an argument looks like images (N, 3, H, W)."""
  shape = getattr(argument, "shape", ())
  return len(shape) == 4 and shape[1] == 3 and shape[3] != 3


def _is_of_numbers(argument: Any) -> bool:
  """Tells if an argument is a whole number of Python, or a tree of such numbers."""
  leaves = [jax.eval_shape(jnp.asarray, leaf) for leaf in jax.tree.leaves(argument)]
  return bool(leaves) and all(
    leaf.weak_type and jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in leaves
  )


def _libraries_in(tree: Any) -> Iterator[str]:
  """Yields the library of each outermost module in a tree."""
  for leaf in jax.tree.leaves(tree, is_leaf=lambda each: _library_of(each) is not None):
    library = _library_of(leaf)
    if library is not None:
      yield library
