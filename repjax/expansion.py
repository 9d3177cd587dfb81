"""`expand`: the way back from a plain network to its training form, with branches and batch norms.

A plain network is expanded in two steps.

1. Every layer is expanded by itself, as its kind says. Its norms have fresh statistics, mean 0 and
   variance 1, and the layer folds into what it was.
2. With images, the training form runs on them once. Each norm takes the statistics of what it sees,
   and a new scale and bias with which it computes the same as before. So the second step changes no
   map in evaluation mode. In training mode every norm then finds the statistics that it has.
"""

import contextlib
import functools
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.core import Tracer

from repjax.algebra import rebase_bn, wide_dtype
from repjax.devices import need_devices
from repjax.errors import InputError, listed, printable
from repjax.layers import AuxHead
from repjax.layers.base import EPSILON, RepLayer
from repjax.layers.batch_norm import BatchNorm
from repjax.layers.remainder import cast
from repjax.models import image_size_of
from repjax.models.checks import check_key
from repjax.recognition import Kind, Path, Tree, kind_of, shown
from repjax.reparam import reparameterize
from repjax.trees import check_leaves, check_tree, misfits, pure


def expand(
  model: nn.Module, deploy_params: Tree, key: jax.Array, *, images: Any = None
) -> dict[str, Any]:
  """Returns variables of a training form that computes the same as a plain network.

  This is the way back from `reparameterize`, for fine-tuning a network of which only the deploy
  form is at hand:

    reparameterize(**expand(model, deploy_params, key)) == deploy_params,  up to rounding.

  Many training forms compute the same. In this one, small branches are drawn as `init` draws them,
  at a tenth of the size of the whole kernel. The largest branch takes what remains. Auxiliary heads
  are drawn anew.

  With images, the training form computes the same in training mode too, for these images and
  without dropout. Its statistics are those of the images. Without images statistics are fresh, so
  that the first step in training mode starts from a different function.

  The function is pure, and works under `jit`. What depends on the values of traced arrays is then
  not checked.

  Args:
    model: the network in training form. Its layers are recognised as by `reparameterize`.
    deploy_params: the "params" collection of the deploy form.
    key: a JAX random key for the small branches and for auxiliary heads.
    images: a batch (N, H, W, C) as the model takes it, normalised. Several hundred images make good
      statistics. A `jax.ShapeDtypeStruct` says only which shape the model takes; None stands for
      one image of the size that the model is made for.

  Returns:
    {"params", "batch_stats"} with the structure, shapes and dtypes of `model.init`.

  Raises:
    InputError: the model is in deploy form, `deploy_params` do not belong to the model, no training
      form computes the same, or the images or the key cannot be used.

  Example:
    >>> import jax, repjax
    >>> plain = repjax.create_model("repvgg_a0", num_classes=10, deploy=True)
    >>> deploy_params = repjax.init(plain, jax.random.key(0), image_size=32)["params"]
    >>> model = repjax.create_model("repvgg_a0", num_classes=10)
    >>> variables = repjax.expand(model, deploy_params, jax.random.key(1))
    >>> sorted(variables["params"]["stem"]["RepConv_0"])
    ['conv1x1', 'conv3x3']
  """
  need_devices()
  _check_arguments(model, key)
  form = _trace(model, _checked_images(model, images))
  held = _checked_params(model, deploy_params, form)
  params = {
    path: _expand_layer(path, kind, axes, _at(held, path), form, key)
    for path, (kind, axes) in form.layers.items()
  }
  variables = {"params": _joined(form.params, held, params), "batch_stats": form.stats}
  if isinstance(images, jax.ShapeDtypeStruct) or images is None:
    return variables
  expanded = _with_statistics(model, variables, jnp.asarray(images), form)
  _check_fold(expanded, held, form)
  return expanded


_TOLERANCE = 1e-4
"""Relative difference of a fold from the deploy form that rounding in float32 can explain."""


class _Form(NamedTuple):
  """A training form as a trace shows it.

  Attributes:
    params: shapes and dtypes of the parameters.
    stats: fresh statistics, with the notes of layers.
    layers: path of each layer to its kind and its number of leading axes.
  """

  params: Tree
  stats: dict[str, Any]
  layers: dict[Path, tuple[Kind, int]]


def _check_arguments(model: Any, key: Any) -> None:
  """Raises InputError if the model is no training form, or the key is none."""
  if not isinstance(model, nn.Module):
    raise InputError(
      f"model must be a flax.linen.Module in training form, got {printable(repr(model), 60)}"
    )
  if getattr(model, "deploy", False):
    raise InputError(
      f"model is the deploy form of {type(model).__name__}, and expand returns variables of the "
      "training form. Pass the training form: create_model(..., deploy=False)"
    )
  check_key(key)


def _checked_images(model: nn.Module, images: Any) -> Any:
  """Returns images, or the shape of those that the model is made for; raises InputError."""
  if images is None:
    size = image_size_of(model)
    return jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  shape, dtype = getattr(images, "shape", None), getattr(images, "dtype", None)
  if shape is None or dtype is None:
    raise InputError(f"images must be an array (N, H, W, C), got {printable(repr(images), 60)}")
  if not jnp.issubdtype(dtype, jnp.floating):
    raise InputError(
      f"images must be floating-point numbers, normalised as the model takes them, got {dtype}. "
      "Pass spec.preprocessing.normalize(images), with spec from repjax.load"
    )
  if not shape or not min(shape):
    raise InputError(f"images must be at least one, got an array of shape {tuple(shape)}")
  return jax.ShapeDtypeStruct(shape, dtype)


def _trace(model: nn.Module, images: jax.ShapeDtypeStruct) -> _Form:
  """Traces a training form, and finds its layers.

  Raises:
    InputError: there is no layer in training form, or a batch norm outside of the layers.
  """
  epsilons: dict[Path, float] = {}

  def note(method: Any, arguments: Any, options: Any, context: Any) -> Any:
    if isinstance(context.module, RepLayer):
      epsilons[context.module.path] = context.module.epsilon
    return method(*arguments, **options)

  with nn.intercept_methods(note):
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  params, stats = shapes.get("params", {}), shapes.get("batch_stats", {})
  layers = dict(_layers(params, stats, ()))
  if not layers:
    raise InputError(
      f"{type(model).__name__} holds no layer of repjax in training form, so there is nothing to "
      "expand. Build its layers with deploy=False"
    )
  return _Form(params, _fresh(stats, epsilons, ()), layers)


def _layers(params: Tree, stats: Tree, path: Path) -> Iterator[tuple[Path, tuple[Kind, int]]]:
  """Yields the layers of a scope: the path of each, its kind and its number of leading axes."""
  if kind := kind_of(path[-1] if path else "", params, stats):
    yield path, (kind, kind.recognize(params) or 0)
    return
  for name, held in stats.items():
    if not (isinstance(held, Mapping) and isinstance(params.get(name), Mapping)):
      raise InputError(
        f"{shown(path)} holds statistics of a batch norm that belongs to no layer of repjax. A "
        "deploy form does not hold such statistics, so expand cannot know them. Use a RepNorm, or "
        "expand the parts of the network around this norm one by one"
      )
    yield from _layers(params[name], held, (*path, name))


def _fresh(shapes: Tree, epsilons: Mapping[Path, float], path: Path) -> dict[str, Any]:
  """Returns fresh statistics: mean 0, variance 1, and the notes of layers."""
  values = {"mean": 0.0, "var": 1.0, "epsilon": epsilons.get(path, EPSILON)}
  return {
    name: _fresh(leaf, epsilons, (*path, name))
    if isinstance(leaf, Mapping)
    else jnp.full(leaf.shape, values.get(name, 1.0), leaf.dtype)  # 1 is the value of marks
    for name, leaf in shapes.items()
  }


def _checked_params(model: nn.Module, deploy_params: Any, form: _Form) -> Tree:
  """Returns the parameters of a deploy form as a tree that fits the model; raises InputError."""
  check_tree("deploy_params", deploy_params)
  held, name = pure(deploy_params), type(model).__name__
  if "params" in held and held.keys() <= {"params", "batch_stats"}:
    raise InputError(
      'expand takes the "params" of a deploy form alone, got a dictionary of collections. Pass '
      'deploy_variables["params"]'
    )
  if not misfits(held, form.params):
    raise InputError(
      f"deploy_params are in training form already: they have the branches of {name}. Pass them "
      "through reparameterize first, or go on training with them as they are"
    )
  wanted = jax.eval_shape(reparameterize, form.params, form.stats)
  if problems := misfits(held, wanted):
    raise InputError(
      f"deploy_params do not fit the deploy form of {name}: "
      f"{listed(problems, 3, between='; ', longest=300)}. Pass the deploy form of "
      "the same model with the same classes and overrides, and images of its size"
    )
  check_leaves((), held)
  return held


def _at(tree: Any, path: Path) -> Any:
  """Returns what lies at a path of a tree, None where nothing does."""
  for name in path:
    tree = tree.get(name) if isinstance(tree, Mapping) else None
  return tree


def _expand_layer(
  path: Path, kind: Kind, axes: int, deploy: Any, form: _Form, key: jax.Array
) -> Any:
  """Expands one layer, and compares its fold with the deploy form.

  Returns:
    Parameters of the layer in training form.

  Raises:
    InputError: no training form of this layer computes the same.
  """
  place = "/".join(map(str, path))
  own = jax.random.fold_in(key, np.uint32(zlib.crc32(place.encode())))
  leaves, structure = jax.tree.flatten(_at(form.params, path))
  try:
    params, error = _expanded(
      kind, axes, tuple(leaves), structure, deploy, _at(form.stats, path), own
    )
  except InputError as problem:
    raise InputError(f"{shown(path)}: {problem}") from problem
  # Written so that a NaN fails too.
  if not isinstance(error, Tracer) and not error <= 1:
    raise InputError(
      f"{shown(path)}: no training form of this {kind.layer.__name__} computes the same. The "
      "parameters are not finite, or a plain network was trained as such: a bias then differs "
      "between the pixels of a share-set, or does not follow from the weights after a norm. Pass a "
      "deploy form that comes from a training form"
    )
  return params


# Layers of the same shapes share one compiled program.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _expanded(
  kind: Kind,
  axes: int,
  leaves: tuple[jax.ShapeDtypeStruct, ...],
  structure: Any,
  deploy: Any,
  stats: Tree,
  key: jax.Array,
) -> tuple[Any, jax.Array]:
  """Expands one layer, along its leading axes if there are any.

  Args:
    kind: kind of the layer.
    axes: number of leading axes.
    leaves, structure: shapes and dtypes of the parameters in training form, flattened.
    deploy: parameters in deploy form; None if the deploy form has no such layer.
    stats: fresh statistics.
    key: a JAX random key.

  Returns:
    The parameters in training form, and the error of their fold, see `_difference`.
  """
  shapes = jax.tree.unflatten(
    structure, [jax.ShapeDtypeStruct(leaf.shape[axes:], leaf.dtype) for leaf in leaves]
  )

  def expand_one(deploy: Any, stats: Tree, key: jax.Array) -> tuple[Any, jax.Array]:
    params = cast(kind.expand(deploy, shapes, stats, EPSILON, key), shapes)
    return params, _difference(kind.fold(params, stats, EPSILON), deploy)

  keys = jax.random.split(key, leaves[0].shape[:axes]) if axes else key
  for _ in range(axes):
    expand_one = jax.vmap(expand_one)
  params, difference = expand_one(deploy, stats, keys)
  return params, difference.max()


def _difference(folded: Any, deploy: Any) -> jax.Array:
  """Returns the largest difference of two trees, relative to the largest number and to rounding.

  The result is at most 1 for trees that differ by rounding alone.
  """
  pairs = list(zip(jax.tree.leaves(folded), jax.tree.leaves(deploy), strict=True))
  dtypes = [leaf.dtype for pair in pairs for leaf in pair]
  tolerance = max([_TOLERANCE, *(32 * float(jnp.finfo(dtype).eps) for dtype in dtypes)])
  largest = apart = jnp.zeros((), wide_dtype(*dtypes))
  for ours, theirs in pairs:
    ours, theirs = ours.astype(largest.dtype), theirs.astype(largest.dtype)
    largest = jnp.maximum(largest, jnp.abs(theirs).max())
    apart = jnp.maximum(apart, jnp.abs(ours - theirs).max())
  # Two layers of zeros are equal, though 0 / 0 is no number.
  return jnp.where(apart == 0, 0.0, apart / (tolerance * largest))


def _joined(shapes: Tree, held: Tree, layers: Mapping[Path, Any], path: Path = ()) -> Any:
  """Returns parameters of the training form: expanded layers, and everything else as it was."""
  if path in layers:
    return layers[path]
  result = {}
  for name, leaf in shapes.items():
    here = (*path, name)
    if isinstance(leaf, Mapping):
      result[name] = _joined(leaf, held.get(name, {}), layers, here)
    else:
      own = held[name]
      result[name] = own if own.dtype == leaf.dtype else jnp.asarray(own, leaf.dtype)
  return result


def _with_statistics(
  model: nn.Module, variables: Tree, images: jax.Array, form: _Form
) -> dict[str, Any]:
  """Gives norms the statistics of images, and the scales and biases that compute the same.

  Raises:
    InputError: the model does not call a norm, or calls it more than once.
  """

  # An auxiliary head is drawn anew, so that it computes nothing that its norms would have to keep.
  anew = [path for path, (kind, _) in form.layers.items() if kind.layer is AuxHead]

  @jax.jit
  def compute(variables: Tree, images: jax.Array) -> dict[str, Any]:
    marked = {**variables, "batch_stats": _marked(variables["batch_stats"])}
    with _rebasing(anew):
      _, updates = model.apply(marked, images, mutable=["params", "batch_stats"])
    return {name: dict(updates[name]) for name in variables}

  result = compute(variables, images)
  _check_means(result["batch_stats"], ())
  return result


def _check_fold(expanded: Tree, held: Tree, form: _Form) -> None:
  """Raises InputError if rounding has lost a layer: statistics of images far from zero cancel."""
  folded = jax.jit(reparameterize)(expanded["params"], expanded["batch_stats"])
  for path, (kind, _) in form.layers.items():
    if kind.layer is AuxHead:
      continue
    error = _difference(_at(folded, path), _at(held, path))
    # Means and spreads of real images cost a few digits. A hundred times more is a lost layer.
    if not isinstance(error, Tracer) and not error <= 100:
      raise InputError(
        f"{shown(path)}: with the statistics of these images, this {kind.layer.__name__} does not "
        f"compute the same in {jnp.dtype(jax.tree.leaves(folded)[0].dtype)}. The images lie too "
        "far from zero for their spread. Normalise them, or expand without images"
      )


def _marked(stats: Tree) -> dict[str, Any]:
  """Returns statistics whose means are NaN: the mark of a norm that has not been called."""
  return {
    name: _marked(held)
    if isinstance(held, Mapping)
    else (jnp.full_like(held, jnp.nan) if name == "mean" else held)
    for name, held in stats.items()
  }


@contextlib.contextmanager
def _rebasing(anew: Collection[Path]) -> Iterator[None]:
  """Gives every norm that runs in evaluation mode the statistics of its input.

  Scale and bias change with the statistics, so that the norm computes the same as before, with mean
  0 and variance 1. Norms in the scopes `anew` keep their scale and bias.

  A second call of the same norm turns the mean into infinity, because one norm cannot have two
  statistics. Values tell this, since Linen may trace a call several times.
  """

  def note(method: Any, arguments: Any, options: Any, context: Any) -> Any:
    norm: Any = context.module
    own = isinstance(norm, nn.BatchNorm) and norm.use_running_average
    if not own or context.method_name != "__call__":
      return method(*arguments, **options)
    held = {name: norm.get_variable("batch_stats", name) for name in ("mean", "var")}
    fresh = {"mean": jnp.zeros_like(held["mean"]), "var": jnp.ones_like(held["var"])}
    params = dict(norm.variables["params"])
    # With no momentum, the new running statistics are those of the input.
    changes: dict[str, Any] = {"use_running_average": False, "momentum": 0.0, "axis_name": None}
    if isinstance(norm, BatchNorm):
      # Training mode divides by the biased variance, also where it is that of one value.
      changes["running_variance"] = "biased"
    alone = norm.clone(parent=None, name=None, **changes)
    variables = {"params": params, "batch_stats": fresh}
    _, updates = alone.apply(variables, *arguments, mutable=["batch_stats"])
    found: dict[str, Any] = dict(updates["batch_stats"])
    _put(norm, "batch_stats", fresh)
    result = method(*arguments, **options)
    if not any(norm.path[: len(path)] == path for path in anew):
      _put(norm, "params", cast(rebase_bn(params, fresh, found, norm.epsilon), params))
    again = jnp.full_like(held["mean"], jnp.inf)
    _put(
      norm,
      "batch_stats",
      found | {"mean": jnp.where(jnp.isnan(held["mean"]), found["mean"], again)},
    )
    return result

  with nn.intercept_methods(note):
    yield


def _put(module: nn.Module, collection: str, values: Tree) -> None:
  """Writes variables of a module."""
  for name, value in values.items():
    module.put_variable(collection, name, value)


def _check_means(stats: Tree, path: Path) -> None:
  """Raises InputError if a norm was not called just once, or its input is not finite."""
  for name, held in stats.items():
    if isinstance(held, Mapping):
      _check_means(held, (*path, name))
    elif name == "mean" and not isinstance(held, Tracer) and not jnp.isfinite(held).all():
      twice = bool(jnp.isinf(held).any())
      reason = (
        "the model calls this norm several times, and one norm cannot have the statistics of each"
        if twice
        else "the images are not finite, or the model does not call this norm in evaluation mode"
      )
      raise InputError(
        f"{shown(path)} has no statistics of these images: {reason}. Leave images out, and "
        "the training form computes the same in evaluation mode alone"
      )
