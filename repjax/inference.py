"""Turns a model of any kind, in its plainest form, into one pure function, ready to be compiled."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from repjax import functions
from repjax.devices import need_devices
from repjax.errors import InputError, listed, unknown
from repjax.functions import Function
from repjax.fusion import Fused
from repjax.fusion.modules import check_callable, check_params
from repjax.models.base import Network
from repjax.models.checks import check_image_size
from repjax.program import traceable
from repjax.recognition import LAYERS
from repjax.reparam import reparameterize
from repjax.spec import Preprocessing, check_preprocessing, evaluation_options, shapes_of
from repjax.trees import check_leaves, check_tree, leaf_name, misfits

DTYPES = ("float32", "bfloat16", "float16")


class Inference(NamedTuple):
  """A model in its plainest form as pure functions of a tree, and the tree.

  Attributes:
    function: a function of the tree and of images; returns float32.
    tree: variables of the deploy form, cast to the dtype of the computation; or the parameters of a
      function; or fused parameters.
    run: for a network in streams: a function of the tree, of maps by scope, and of the scopes to
      run, like the network's method `run`. Images are normalized and cast as by `function`. The
      map of the last scope, if the network's output is this one map, is the result of `function`.
    network: the deploy form as a module; None for a function.
  """

  function: Function
  tree: Any
  run: Callable[[Any, dict[str, jax.Array], Sequence[str]], dict[str, jax.Array]]
  network: Any


class _Plain(NamedTuple):
  """A model in its plainest form, before images are prepared and results are finished.

  Attributes:
    apply: a function of the tree and of images.
    tree: what the function reads.
    network: the module, or None.
  """

  apply: Function
  tree: Any
  network: Any = None


def inference(
  model: Any,
  variables: Any,
  *,
  image_size: int | tuple[int, int],
  dtype: jax.typing.DTypeLike,
  preprocessing: Preprocessing | None,
  probabilities: bool,
  fuse: bool = False,
) -> Inference:
  """Brings a model into its plainest form and returns functions that are ready to be compiled.

  Args:
    model: a Linen module in either form, a function of parameters and of images, or what
      `repjax.fuse` returned.
    variables: variables of the module, parameters of the function, or what `fold` returned.
    image_size: pixels, one number or (height, width).
    dtype: "float32", "bfloat16" or "float16": dtype of parameters and of the computation.
    preprocessing: normalizes uint8 images inside the functions; None takes normalized images.
    probabilities: returns a softmax of the logits.
    fuse: merges what can be merged by `repjax.fuse`, except in deploy forms of repjax, in which
      nothing is left to merge.

  Raises:
    InputError: an argument cannot be used, the variables do not fit the model, the model has no
      deploy form, or a function cannot be traced.
  """
  need_devices()
  check_image_size(image_size)
  dtype = checked_dtype(dtype)
  if preprocessing is not None:
    check_preprocessing(preprocessing)
  if probabilities and getattr(model, "features_only", False):
    raise InputError(
      "a model with features_only=True has no classifier; leave probabilities out, or features_only"
    )
  apply, tree, network = _plainest(model, variables, image_size, dtype, fuse)

  def ready(images: jax.Array) -> jax.Array:  # before the network
    if preprocessing is not None:
      images = preprocessing.normalize(images, dtype)
    return images.astype(dtype)

  def finished(outputs: Any) -> Any:  # after the network
    outputs = jax.tree.map(lambda rows: rows.astype(jnp.float32), outputs)
    if not probabilities:
      return outputs
    if getattr(outputs, "ndim", 0) != 2:
      raise InputError(
        "probabilities need a model that returns one array of logits (N, K), and this model "
        f"returns {_described(outputs)}. Let it return the logits alone, as one array, or use "
        "`repjax.deploy.compile` without probabilities for results of any kind"
      )
    return jax.nn.softmax(outputs)

  def function(tree: Any, images: jax.Array) -> Any:
    return finished(functions.check_results(apply(tree, ready(images)), images))

  def run(tree: Any, maps: dict[str, jax.Array], scopes: Sequence[str]) -> dict[str, jax.Array]:
    if "images" in maps:
      maps = maps | {"images": ready(maps["images"])}
    made: Any = network.apply(tree, maps, scopes, method="run")
    # A classifier's output is one scope. A network that returns feature maps has several outputs,
    # which the caller casts to float32 on the host.
    last = network.outputs
    return made | {last: finished(made[last])} if last in tuple(scopes) else made

  return Inference(function, tree, run, network)


def _described(outputs: Any) -> str:
  """Returns what a model returned, for a message: the kind of the tree, and the shapes in it."""
  paths = jax.tree_util.tree_leaves_with_path(outputs)
  # The first axis is the batch, whatever the size that the model was traced with.
  shapes = [
    f"{leaf_name(path)} ({', '.join(['N', *map(str, leaf.shape[1:])])})".strip()
    for path, leaf in paths
  ]
  kind = "an array" if hasattr(outputs, "shape") else f"a {type(outputs).__name__} of"
  return f"{kind} {listed(shapes, 3)}"


def _plainest(
  model: Any, variables: Any, image_size: int | tuple[int, int], dtype: np.dtype, fuse: bool
) -> _Plain:
  """Returns a model of any kind in its plainest form."""
  size = image_size if isinstance(image_size, tuple) else (image_size, image_size)
  if isinstance(model, Fused):
    functions.check_fused(model, variables, dtype, size)
    return _Plain(model.without_checks(), variables)
  cast = functools.partial(jax.tree.map, functools.partial(_cast, dtype=dtype))
  if isinstance(model, nn.Module):
    plain = _of_module(model, variables, image_size, dtype)
    # The deploy form of a network of repjax has no statistics left, and nothing to merge.
    is_merged = isinstance(plain.network, Network) and "batch_stats" not in plain.tree
  else:
    check_callable(model)
    check_params(variables)
    plain, is_merged = _Plain(model, variables), False
    with _called_in_training_form() as scopes:
      functions.check_dtype(model, jax.eval_shape(cast, variables), dtype, size)
    if scopes and not fuse:
      _warn_of_training_form(functions.name_of(model), scopes)
  if fuse and not is_merged:
    # Kernels are folded from the parameters before they are cast, and rounded once.
    fused = functions.fused(
      lambda tree, images: plain.apply(cast(tree), images), plain.tree, size, dtype, model
    )
    if fused is not None:
      return _Plain(fused, fused.fold(plain.tree), plain.network)
  return plain._replace(tree=cast(plain.tree))


def _of_module(
  model: nn.Module,
  variables: Mapping[str, Any],
  image_size: int | tuple[int, int],
  dtype: np.dtype,
) -> _Plain:
  """Returns the deploy form of a Linen module, which computes in a dtype."""
  with traceable("repjax"):
    plain, tree = _deploy_form(model, variables, image_size)
  if hasattr(plain, "dtype"):
    plain = plain.clone(dtype=dtype)
  elif dtype != jnp.float32:
    raise InputError(
      f"{type(model).__name__} has no attribute `dtype`, so it cannot compute in {dtype}. Give the "
      "module one and pass it to its layers, or compile the model in float32."
    )
  apply = functools.partial(plain.apply, **evaluation_options(plain))
  return _Plain(apply, tree, plain)


def checked_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
  """Returns a dtype as NumPy's.

  Raises:
    InputError: the dtype is not among DTYPES.
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
  """Returns the deploy form of a model and of its variables, each of which may be in either form.

  Raises:
    InputError: the variables do not fit the model in any form.
  """
  check_tree("variables", variables)
  if "params" not in variables:
    raise InputError(
      'variables must be {"params": ...}, in training form with "batch_stats", as `repjax.load` '
      f"and `repjax.init` return them, got {sorted(variables)}. Wrap a deploy tree as "
      '{"params": tree}.'
    )
  for name, collection in variables.items():
    check_tree(f"variables[{name!r}]", collection)
  plain: Any = model
  if not getattr(model, "deploy", True):
    plain = model.clone(deploy=True)
  wanted = shapes_of(plain, image_size)
  tree = dict(variables)
  # Statistics mark the training form, unless the deploy form has statistics too: somebody's module
  # may contain a batch norm that is no layer of repjax and is never folded.
  if tree.get("batch_stats") and "batch_stats" not in wanted:
    statistics = tree.pop("batch_stats")
    try:
      tree["params"] = jax.jit(reparameterize)(tree["params"], statistics)
    except InputError:
      raise
    except ValueError as error:  # Commands show an InputError as one paragraph.
      raise InputError(str(error)) from error
  tree = {name: value for name, value in tree.items() if value}  # without empty collections
  if getattr(plain, "features_only", False):
    tree = _without_head(tree, wanted)
  _check_fit(type(model).__name__, tree, wanted)
  check_leaves((), _where_floating(tree, wanted))
  if "batch_stats" in tree:
    _warn_of_branches(plain, image_size)
  return plain, tree


def _where_floating(tree: Any, wanted: Any) -> Any:
  """Returns the part of a tree for which a model has floating-point numbers."""
  if not isinstance(tree, Mapping):
    return tree if jnp.issubdtype(wanted.dtype, jnp.floating) else {}
  return {name: _where_floating(value, wanted[name]) for name, value in tree.items()}


def training_layers(network: nn.Module, image_size: int | tuple[int, int]) -> list[str]:
  """Lists the scopes of the layers of repjax in a network that are in training form.

  The network is traced, because a scope can have any name.
  """
  trace: Any = shapes_of.__wrapped__  # the function without its memory of results
  with _called_in_training_form() as found:
    trace(network, image_size)
  return list(found)


@contextlib.contextmanager
def _called_in_training_form() -> Iterator[dict[str, None]]:
  """Notes the scopes of the layers of repjax in training form that the block calls, in order."""
  found: dict[str, None] = {}

  def note(method: Any, arguments: Any, options: Any, context: Any) -> Any:
    layer = context.module
    if isinstance(layer, LAYERS) and not layer.deploy:
      # A layer of NNX stands alone, and has no path.
      found["/".join(layer.path) or f"a {type(layer).__name__}"] = None
    return method(*arguments, **options)

  with nn.intercept_methods(note):
    yield found


def _warn_of_training_form(name: str, scopes: Collection[str]) -> None:
  """Warns about a function that is about to be written with the branches of its layers."""
  warnings.warn(
    f"{name} calls layers of repjax in training form, such as {next(iter(scopes))}: "
    "every branch is computed. Pass a function of the network in deploy form with the parameters "
    "from repjax.reparameterize, or what repjax.fuse makes of this function",
    stacklevel=5,
  )


def _warn_of_branches(network: nn.Module, image_size: int | tuple[int, int]) -> None:
  """Warns if a network is about to be compiled or written with its branches."""
  scopes = training_layers(network, image_size)
  if scopes:
    warnings.warn(
      f"{type(network).__name__} still has {len(scopes)} layers in training form, such as "
      f"{scopes[0]}: every branch is computed. Only an attribute called `deploy` is set "
      "here. Build the network with deploy=True in these layers, and pass "
      '{"params": repjax.reparameterize(variables["params"], variables["batch_stats"])}',
      stacklevel=7,
    )


def _without_head(tree: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
  """Leaves out top-level scopes that the model does not have, which are its classifier.

  A model that returns feature maps can thus take the variables of a whole classifier.
  """
  return {
    name: {scope: value for scope, value in below.items() if scope in wanted.get(name, {})}
    for name, below in tree.items()
  }


def _check_fit(name: str, tree: Any, wanted: Any) -> None:
  """Raises InputError if the paths and shapes of a tree are not those of the model."""
  problems = misfits(tree, wanted)
  if problems:
    raise InputError(
      f"these variables do not fit {name} in its deploy form: "
      f"{listed(problems, 3, between='; ', longest=300)}. Pass variables of the same model with "
      "the same classes, overrides and image size. They may be in deploy form, or in training form "
      'with their "batch_stats".'
    )
