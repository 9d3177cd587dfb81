"""Checks of functions and their parameters: modules of other libraries are refused in words."""

import sys
from collections.abc import Iterator
from typing import Any

import jax

from repjax.errors import InputError, listed, printable, sentences
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
  """Tells if a leaf is an array, a shape and dtype, or a number of Python."""
  has_both = hasattr(leaf, "shape") and hasattr(leaf, "dtype")  # modules may have one of them
  return has_both or isinstance(leaf, int | float | complex)


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
        f"is {printable(repr(leaf), 80)}{more}",
        f"The tree holds a module of {library}: {_WAYS[library][1]}"
        if library
        else "Pass arrays here, and bind settings with functools.partial",
      )
    )


def _libraries_in(tree: Any) -> Iterator[str]:
  """Yields the library of each outermost module in a tree."""
  for leaf in jax.tree.leaves(tree, is_leaf=lambda each: _library_of(each) is not None):
    library = _library_of(leaf)
    if library is not None:
      yield library
