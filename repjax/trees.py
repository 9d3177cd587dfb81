"""Checks of trees of variables that come from outside: one sentence names what came."""

import math
import numbers
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from repjax.errors import InputError, listed, printable

_RANKS = (2, 4, 7)
"""Numbers of axes that kernels have."""
_LIFTED = ("Vmap", "Scan")
"""Linen begins the automatic names of layers under `nn.vmap` and `nn.scan` so."""
_ARRAYS = {"kernel", "bias", "scale", "gain", "diagonal", "gamma"}
"""Names of the parameters that layers of repjax hold. All other names are scopes."""
_DEEPEST = 100
"""Largest number of scopes inside of one another. A walk over deeper trees exhausts the stack."""


def pure(tree: Mapping[Any, Any]) -> Mapping[Any, Any]:
  """Returns a tree of arrays for a tree of variables of Flax NNX; other trees as they are.

  The leaves of an `nnx.State` are such variables.
  """
  nnx = sys.modules.get("flax.nnx")
  if nnx is None or not any(isinstance(leaf, nnx.Variable) for _, leaf in leaves(tree)):
    return tree

  def values(tree: Any) -> Any:
    if isinstance(tree, Mapping):
      return {key: values(value) for key, value in tree.items()}
    return tree.get_value() if isinstance(tree, nnx.Variable) else tree

  return values(tree)


def leaf_name(path: Sequence[Any]) -> str:
  """Returns the name of a leaf of any tree, from its path in `jax.tree_util`.

  Flax NNX puts `.value` at the end of each path, which is left out.

  Example:
    >>> leaf_name(jax.tree_util.tree_leaves_with_path({"conv": {"kernel": 1.0}})[0][0])
    'conv/kernel'
  """
  name = jax.tree_util.keystr(tuple(path), simple=True, separator="/")
  return name.removesuffix("/value")


def is_key(leaf: Any) -> bool:
  """Tells if an array, or its shape and dtype, is a random key, which is no array of numbers."""
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


_GENERATORS = {"fry": "threefry2x32", "rbg": "rbg", "urbg": "unsafe_rbg"}
"""The generators of JAX, by the names that dtypes of keys have."""


def generator_of(key: Any) -> str:
  """Returns the generator of a random key, or of its shape and dtype, for `jax.random.key`."""
  return _GENERATORS[str(key.dtype).removeprefix("key<").removesuffix(">")]


def check_tree(where: str, tree: Any) -> None:
  """Checks that a tree is made of nested dictionaries, and belongs to one device.

  Args:
    where: name of the tree, for the message.
    tree: parameters, statistics, or both by collection.

  Raises:
    InputError: the tree is no dictionary, is a flat one, or has an axis of devices.
  """
  if not isinstance(tree, Mapping):
    raise InputError(f"{where} must be nested dictionaries of arrays, got {_kind(tree)}")
  flat = next((key for key, value in tree.items() if _is_path(key, value)), None)
  if flat is not None:
    separator = "" if isinstance(flat, tuple) else f', sep="{"/" if "/" in flat else "."}"'
    raise InputError(
      f"{where} must be nested dictionaries, got a flat one with the key "
      f"{printable(repr(flat), 100)}. Nest it: flax.traverse_util.unflatten_dict(tree{separator})"
    )
  for path, leaf in leaves(tree):
    if isinstance(leaf, list | tuple) and any(isinstance(part, Mapping) for part in leaf):
      raise InputError(
        f"{where} must be nested dictionaries of arrays, got {_kind(leaf)} at "
        f"{printable('/'.join(map(str, path)), 200)}. flax.serialization.to_state_dict(tree) makes "
        "dictionaries of lists"
      )
    # Lists of Flax NNX have numbers for names, but never at the top.
    if odd := [key for key in path[:1] if not isinstance(key, str | tuple)]:
      raise InputError(
        f"{where} must have names of scopes for keys, got {printable(repr(odd[0]), 100)}"
      )
  shapes = {path: jnp.shape(leaf) for path, leaf in leaves(tree) if hasattr(leaf, "shape")}
  kernels = [len(shape) for path, shape in shapes.items() if path[-1] == "kernel"]
  if not kernels or any(rank - 1 not in _RANKS or rank in _RANKS for rank in kernels):
    return
  leading = {shape[:1] for shape in shapes.values()}
  lifted = any(str(key).startswith(_LIFTED) for path in shapes for key in path)
  if len(leading) == 1 and not lifted:
    ((count,),) = leading
    raise InputError(
      f"every leaf of {where} has a first axis of {count}, as a tree has that is replicated over "
      f"{count} devices for pmap, or that holds {count} networks. Take one copy: "
      "jax.tree.map(lambda leaf: leaf[0], tree), or map the function over all: "
      "jax.vmap(function)(...)"
    )


def check_apart(params: Any, stats: Any) -> None:
  """Checks that no statistics of batch norms lie among parameters, nor parameters among statistics.

  Args:
    params: nested dictionaries of parameters.
    stats: nested dictionaries of statistics.

  Raises:
    InputError: a scope called `bn` holds statistics, or a statistic is called `kernel`.
  """
  for path, _ in leaves(stats):
    if path[-1] == "kernel":
      raise InputError(
        f"batch_stats hold parameters: {printable('/'.join(map(str, path)))}. Pass "
        'variables["batch_stats"] alone, or {} for a network without statistics'
      )
  for path, _ in leaves(params):
    if path[-2:] in (("bn", "mean"), ("bn", "var")):
      raise InputError(
        f"params hold statistics too: {printable('/'.join(map(str, path)))}. Pass the two apart. "
        "An NNX model has nnx.state(model, nnx.Param) and nnx.state(model, nnx.BatchStat)"
      )


def check_arrays(path: tuple[str, ...], tree: Any) -> None:
  """Checks that all leaves of a tree are arrays of any dtype, not shapes alone.

  Args:
    path: place of the tree, for the message.
    tree: nested dictionaries below this path.

  Raises:
    InputError: a leaf is something else.
  """
  for below, leaf in leaves(tree):
    place = _place(path, *below)
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape") or leaf.dtype == object:
      raise InputError(f"{place} must be an array, got {_kind(leaf)}")
    if isinstance(leaf, jax.ShapeDtypeStruct):
      raise InputError(
        f"{place} must be an array, got a shape alone. Pass the function and the shapes to "
        "jax.eval_shape"
      )


def check_leaves(path: tuple[str, ...], tree: Any) -> None:
  """Checks that all leaves of a tree are arrays of floating-point numbers.

  Args:
    path: place of the tree, for the message.
    tree: parameters or statistics below this path.

  Raises:
    InputError: a leaf is something else.
  """
  check_arrays(path, tree)
  for below, leaf in leaves(tree):
    place = _place(path, *below)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise InputError(
        f"{place} must hold floating-point numbers, got {leaf.dtype}. Integers are weights in 8 "
        "bits perhaps, which must be multiplied by their scales first"
        if jnp.issubdtype(leaf.dtype, jnp.integer)
        else f"{place} must hold floating-point numbers, got {leaf.dtype}"
      )


def check_parts(path: tuple[str, ...], params: Any, stats: Any, axes: int) -> None:
  """Checks that arrays and scopes of a layer lie where folds read them.

  Args:
    path: place of the layer, for the message.
    params: parameters of the layer, all of them arrays.
    stats: statistics of the layer and its notes, all of them arrays.
    axes: number of leading axes of the layer.

  Raises:
    InputError: an array lies in the place of a scope or a scope in the place of an array, a
      convolution has no kernel, a note is no single finite number of at least 0, or parameters lack
      a norm.
  """
  _check_params(path, params, axes)
  _check_stats(path, params, stats, axes)


def _check_params(path: tuple[str, ...], params: Any, axes: int) -> None:
  """Raises InputError if a scope does not hold arrays and scopes by their names."""
  for name, value in params.items():
    here = _place(path, name)
    if not isinstance(name, str):
      raise InputError(f"{here} must have a text for a name, got {printable(repr(name), 60)}")
    if isinstance(value, Mapping) == (name in _ARRAYS):
      raise InputError(f"{here} must be {_wanted(name in _ARRAYS)}, got {_form(value)}")
    if isinstance(value, Mapping):
      _check_params((*path, name), value, axes)
    if name == "conv":
      _check_kernel((*path, name), value, axes)


def _check_kernel(path: tuple[str, ...], conv: Any, axes: int) -> None:
  """Raises InputError if a convolution has no kernel, or none of four axes."""
  kernel = conv.get("kernel")
  if kernel is None or kernel.ndim != axes + 4 or not all(kernel.shape[axes:]):
    held = _form(conv) if kernel is None else f"one of shape {kernel.shape}"
    raise InputError(f"{_place(path)} must hold a kernel (H, W, I, O), got {held}")


def _check_stats(path: tuple[str, ...], params: Any, stats: Any, axes: int) -> None:
  """Raises InputError if statistics of a scope belong to no norm, or a note is no number."""
  for name, value in stats.items():
    here, is_scope = _place(path, name), isinstance(params.get(name), Mapping)
    if not isinstance(name, str):
      raise InputError(f"{here} must have a text for a name, got {printable(repr(name), 60)}")
    if is_scope and not isinstance(value, Mapping):
      raise InputError(f"{here} must be {_wanted(False)} of statistics, got {_form(value)}")
    if not is_scope and isinstance(value, Mapping):
      raise InputError(
        f"{here} holds statistics, but params have no scope there: the two trees do not belong "
        "together"
      )
    if not is_scope:
      _check_scalar(here, value, axes)
      check_note((*path, name), value)
    elif name == "bn":
      if odd := [below for below, leaf in value.items() if isinstance(leaf, Mapping)]:
        raise InputError(f"{_place(path, name, odd[0])} must be {_wanted(True)}")
    else:
      _check_stats((*path, name), params[name], value, axes)


def _check_scalar(here: str, note: Any, axes: int) -> None:
  """Raises InputError if a note is not one number for each copy of the layer."""
  if note.ndim != axes:
    raise InputError(f"{here} must be one number, got an array of shape {note.shape}")


def check_note(path: tuple[str, ...], note: Any) -> None:
  """Checks a number beside statistics that says what shapes do not, such as an epsilon.

  Under a transformation of JAX such as `jit` the number is not known yet, and passes.

  Args:
    path: place of the note, for the message.
    note: the number, or an array of one number for each copy of a layer.

  Raises:
    InputError: a number is negative, infinite or NaN.
  """
  is_known = not isinstance(note, jax.Array) or (
    not isinstance(note, Tracer) and note.is_fully_addressable
  )
  if is_known and not all(0 <= number < math.inf for number in np.ravel(note)):
    raise InputError(
      f"{_place(path)} must be a finite number of at least 0, got "
      f"{printable(' '.join(str(np.asarray(note)).split()), 60)}. Restore the statistics of the "
      "layer, which hold it"
    )


def _wanted(is_array: bool) -> str:
  """Says which of the two things a tree holds is wanted."""
  return "an array" if is_array else "a dictionary"


def _form(value: Any) -> str:
  """Describes an array or a dictionary for a message."""
  if isinstance(value, Mapping):
    return f"a dictionary of {listed(value) or 'nothing'}"
  return f"an array of shape {value.shape}"


def _place(path: tuple[Any, ...], *names: Any) -> str:
  """Returns a path for a message."""
  return printable("/".join(map(str, (*path, *names)))) or "the tree"


def misfits(given: Any, wanted: Any) -> list[str]:
  """Lists where the paths and shapes of a tree are not those of a different tree.

  Args:
    given: a tree of arrays.
    wanted: a tree of arrays or of shapes.

  Returns:
    A clause for each difference; empty if there is none.
  """
  held, expected = _shapes(given), _shapes(wanted)
  problems = [f"{path} is missing" for path in expected if path not in held]
  problems += [f"{path} is unknown" for path in held if path not in expected]
  problems += [
    f"{path} is {held[path]} where the model has {expected[path]}"
    for path in expected
    if path in held and held[path] != expected[path]
  ]
  return problems


def _shapes(tree: Any) -> dict[str, Any]:
  """Returns the shapes of a tree's leaves by path; a leaf that is no array gives its type."""
  return {"/".join(map(str, path)): _shape(leaf) for path, leaf in leaves(tree)}


def _shape(leaf: Any) -> Any:
  """Returns the shape of an array or number, else its type in words."""
  if isinstance(leaf, numbers.Number):
    return ()
  return getattr(leaf, "shape", f"a {type(leaf).__name__}")


def _is_path(key: Any, value: Any) -> bool:
  """Tells if a key of a tree is the path of a leaf, not the name of a scope."""
  if isinstance(key, tuple):
    return True
  return isinstance(key, str) and ("/" in key or ("." in key and not isinstance(value, Mapping)))


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
  """Yields the path and value of everything in a tree that is no dictionary.

  Raises:
    InputError: the tree is deeper than the tree of any network, or holds itself.
  """
  if len(path) > _DEEPEST:
    raise InputError(
      f"{printable('/'.join(map(str, path)), 60)} lies more than {_DEEPEST} scopes deep. No "
      "network is so deep; perhaps a dictionary of the tree holds itself"
    )
  if isinstance(tree, Mapping):
    for key, value in tree.items():
      yield from leaves(value, (*path, key))
  else:
    yield path, tree


def _kind(value: Any) -> str:
  """Describes a value for a message."""
  if isinstance(value, list | tuple):
    return f"a {type(value).__name__} of {len(value)}"
  if isinstance(value, jax.Array):
    return f"one array {value.shape}"
  return f"{printable(repr(value), 60)}, of type {type(value).__name__}"
