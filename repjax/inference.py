"""What is compiled or exported: a model's deploy form with its variables, cast, as one function."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from repjax.errors import InputError, unknown
from repjax.reparam import reparameterize
from repjax.spec import Preprocessing, shapes_of

DTYPES = ("float32", "bfloat16", "float16")


class Inference(NamedTuple):
  """What is compiled or exported: pure functions of a tree, and the tree.

  Attributes:
    function: of the tree and images; returns float32.
    tree: of the deploy form, cast.
    run: of the tree, maps by scope and scopes, as `run` of a network in streams. It takes "images"
      as `function` does, and what it returns of the only output is what `function` returns.
    network: the deploy form.
  """

  function: Callable[[Any, jax.Array], Any]
  tree: Any
  run: Callable[[Any, dict[str, jax.Array], Sequence[str]], dict[str, jax.Array]]
  network: Any


def inference(
  model: nn.Module,
  variables: Mapping[str, Any],
  *,
  image_size: int | tuple[int, int],
  dtype: jax.typing.DTypeLike,
  preprocessing: Preprocessing | None,
  probabilities: bool,
) -> Inference:
  """What is compiled or exported; Args and Raises as in `compile`."""
  _check_image_size(image_size)
  dtype = checked_dtype(dtype)
  plain, tree = _deploy_form(model, variables, image_size)
  if hasattr(plain, "dtype"):
    plain = plain.clone(dtype=dtype)
  elif dtype != jnp.float32:
    raise InputError(
      f"{type(model).__name__} has no attribute `dtype`, so that it cannot compute in {dtype}; "
      "give it one and hand it to its layers, or compile it in float32"
    )
  if probabilities and getattr(model, "features_only", False):
    raise InputError("a model with features_only=True has no classifier, and so no probabilities")
  tree = jax.tree.map(lambda leaf: _cast(leaf, dtype), tree)

  def ready(images: jax.Array) -> jax.Array:
    if preprocessing is not None:
      images = preprocessing.normalize(images, dtype)
    return images.astype(dtype)

  def finished(outputs: Any) -> Any:
    outputs = jax.tree.map(lambda rows: rows.astype(jnp.float32), outputs)
    return jax.nn.softmax(outputs) if probabilities else outputs

  def function(tree: Any, images: jax.Array) -> Any:
    return finished(plain.apply(tree, ready(images)))

  def run(tree: Any, maps: dict[str, jax.Array], scopes: Sequence[str]) -> dict[str, jax.Array]:
    if "images" in maps:
      maps = maps | {"images": ready(maps["images"])}
    made: Any = plain.apply(tree, maps, scopes, method="run")
    last = plain.outputs
    return made | {last: finished(made[last])} if last in tuple(scopes) else made

  return Inference(function, tree, run, plain)


def _check_image_size(size: Any) -> None:
  sides = size if isinstance(size, tuple) and len(size) == 2 else (size,)
  if not all(type(side) is int and side > 0 for side in sides):
    raise InputError(
      f"image_size is a whole number of pixels or a tuple (height, width), got {size!r}"
    )


def checked_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
  """One of DTYPES as NumPy's.

  Raises:
    InputError: another one.
  """
  try:
    name = jnp.dtype(dtype).name
  except TypeError:
    name = str(dtype)
  if name not in DTYPES:
    raise unknown("dtype", name, DTYPES)
  return jnp.dtype(name)


def _cast(leaf: Any, dtype: np.dtype) -> jax.Array:
  leaf = jnp.asarray(leaf)
  return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _deploy_form(
  model: nn.Module, variables: Mapping[str, Any], image_size: int | tuple[int, int]
) -> tuple[nn.Module, dict[str, Any]]:
  """The deploy form of a model and its variables, whatever form they have."""
  if "params" not in variables:
    raise InputError(
      'variables are what `repjax.load` or `repjax.init` return, {"params": ...} and in training '
      f'form "batch_stats", got {sorted(variables)}; wrap a deploy tree as {{"params": tree}}'
    )
  plain: Any = model
  if not getattr(model, "deploy", True):
    plain = model.clone(deploy=True)
  wanted = shapes_of(plain, image_size)
  tree = dict(variables)
  # A deploy form's own statistics, of a norm that is no layer of repjax, stay.
  if tree.get("batch_stats") and "batch_stats" not in wanted:
    statistics = tree.pop("batch_stats")
    try:
      tree["params"] = jax.jit(reparameterize)(tree["params"], statistics)
    except InputError:
      raise
    except ValueError as error:
      raise InputError(str(error)) from error
  tree = {name: value for name, value in tree.items() if value}
  if getattr(plain, "features_only", False):
    tree = _without_head(tree, wanted)
  _check_fit(type(model).__name__, tree, wanted)
  return plain, tree


def _without_head(tree: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
  """Leaves out top-level scopes that a model which returns feature maps does not read."""
  return {
    name: {scope: value for scope, value in below.items() if scope in wanted.get(name, {})}
    for name, below in tree.items()
  }


def _check_fit(name: str, tree: Any, wanted: Any) -> None:
  """Raises InputError where a tree is not that of the model."""
  ours, theirs = _shapes(tree), _shapes(wanted)
  problems = [f"{path} is missing" for path in theirs if path not in ours]
  problems += [f"{path} is unknown" for path in ours if path not in theirs]
  problems += [
    f"{path} is {ours[path]} where the model has {theirs[path]}"
    for path in ours.keys() & theirs.keys()
    if ours[path] != theirs[path]
  ]
  if problems:
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise InputError(
      f"these variables do not fit {name} in its deploy form: {'; '.join(problems[:3])}{more}. "
      "They must be those of the same model with the same classes, overrides and image size, in "
      'deploy form, or in training form with their "batch_stats"'
    )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {"/".join(str(entry.key) for entry in path): jnp.shape(leaf) for path, leaf in flat}
