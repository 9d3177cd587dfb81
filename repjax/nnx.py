"""Layers of repjax as modules of Flax NNX, and `load`, which fills an NNX model with arrays.

A module here holds the variables of a Linen layer, and computes with that layer. Both therefore
have the same tree and the same forward pass, and one fold serves both:

    params, stats = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    deploy = Network(deploy=True, rngs=nnx.Rngs(0))
    repjax.nnx.load(deploy, repjax.reparameterize(params, stats))
"""

import dataclasses
import numbers
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from repjax import layers
from repjax.errors import InputError, listed, printable, unknown
from repjax.layers import RepLayer
from repjax.trees import check_arrays, leaves, pure

__all__ = ["RepConv", "RepNorm", "load"]

Tree = Mapping[Any, Any]

_SIDE = 1024
"""Height and width of the map from which the shapes of parameters are found.

The shapes do not depend on the size. The map only must be larger than the kernels and paddings.
"""
_CHANGEABLE = ("axis_name", "running_variance", "statistics", "dtype")
"""Attributes on which neither the tree nor its fold depends."""


class _Module(nnx.Module):
  """An NNX module that holds the variables of a Linen layer and computes with this layer.

  `model.train()` and `model.eval()` choose what the batch norms normalise with, as for
  `nnx.BatchNorm`. New modules in training form are in training mode.

  Attributes:
    in_features: number of input channels.
    use_running_average: normalise with the running statistics, not with those of the batch.
  """

  linen: ClassVar[type[RepLayer]]

  def __init__(self, in_features: int, rngs: nnx.Rngs, attributes: Mapping[str, Any]):
    if not hasattr(rngs, "params"):
      raise InputError(
        "rngs must be random streams that draw parameters, such as nnx.Rngs(0), got "
        f"{printable(repr(rngs), 60)}"
      )
    if not (isinstance(in_features, numbers.Integral) and in_features > 0):
      raise InputError(
        f"in_features takes a whole number above 0, got {printable(repr(in_features), 60)}"
      )
    if odd := attributes.keys() - set(self._attributes()):
      raise unknown(f"attribute of {type(self).__name__}", min(odd), self._attributes())
    # A name that begins with no class name makes the layer write its mark, see `RepLayer.note`.
    layer = self.linen(**attributes, name="layer", parent=None)
    self.in_features = in_features
    self.use_running_average = layer.deploy
    images = jax.ShapeDtypeStruct((1, _SIDE, _SIDE, in_features), layer.dtype)
    fresh = layer.lazy_init(rngs.params(), images)
    params = jax.tree.map(nnx.Param, flatten_dict(fresh["params"]))
    stats = jax.tree.map(nnx.BatchStat, flatten_dict(fresh.get("batch_stats", {})))
    scopes = unflatten_dict(params | stats)
    for name, held in scopes.items():
      setattr(self, name, _dictionaries(held))
    for name in self._attributes():
      if name not in scopes:  # a note of epsilon is the attribute `epsilon`
        setattr(self, name, getattr(layer, name))

  @classmethod
  def _attributes(cls) -> Iterator[str]:
    """Yields the names of the Linen layer's attributes."""
    return (
      field.name for field in dataclasses.fields(cls.linen) if field.name not in ("name", "parent")
    )

  def __setattr__(self, name: str, value: Any) -> None:
    """Sets an attribute; refuses changes after which the tree would not fit its layer."""
    held = vars(self).get(name, value)
    if name in self._attributes() and name not in _CHANGEABLE:
      replaced = isinstance(held, nnx.Variable) and not isinstance(value, nnx.Variable)
      if replaced or (not isinstance(held, nnx.Variable) and held != value):
        raise InputError(
          f"{name} of a {type(self).__name__} cannot change to {printable(repr(value), 60)}: the "
          "layer's variables belong to the old value. Build a new layer with "
          f"{name}={printable(repr(value), 60)}"
        )
    super().__setattr__(name, value)

  def __call__(self, x: jax.Array, train: bool | None = None) -> jax.Array:
    """Maps (..., I) as the Linen layer does, and in training mode updates the statistics.

    Args:
      x: input with `in_features` channels.
      train: normalise with the statistics of the batch and update the running ones. None takes
        what `model.train()` or `model.eval()` has chosen.

    Raises:
      InputError: the input has a different number of channels.
      ValueError: training mode in deploy form.
    """
    if x.shape[-1] != self.in_features:
      raise InputError(
        f"a {type(self).__name__} with in_features={self.in_features} got an input of "
        f"{x.shape[-1]} channels, with the shape {x.shape}. Build the layer with "
        f"in_features={x.shape[-1]}"
      )
    train = not self.use_running_average if train is None else train
    attributes = {name: getattr(self, name) for name in self._attributes()}
    if isinstance(attributes["epsilon"], nnx.Variable):
      del attributes["epsilon"]  # the Linen layer reads the note
    layer = self.linen(**attributes, name="layer", parent=None)
    stats, params = nnx.state(self, nnx.BatchStat, ...)
    variables = {"params": nnx.to_pure_dict(params), "batch_stats": nnx.to_pure_dict(stats)}
    y, updates = layer.apply(variables, x, train, mutable=["batch_stats"] if train else [])
    if train:
      nnx.update(self, updates["batch_stats"])
    return y

  def set_view(self, use_running_average: bool | None = None) -> None:
    """Takes part in `nnx.view`, as `nnx.BatchNorm` does.

    Args:
      use_running_average: new value of the attribute; None keeps the old one.
    """
    if use_running_average is not None:
      self.use_running_average = use_running_average


class RepConv(_Module):
  """A sum of conv-BN branches over one input; its deploy form is one convolution with bias.

  The module has the attributes, the tree and the forward pass of `repjax.layers.RepConv`. All
  attributes but `axis_name`, `running_variance`, `statistics` and `dtype` are fixed when the layer
  is built.

  Args:
    in_features: number of input channels I.
    features: number of output channels O.
    rngs: random streams, of which "params" draws the initial values.
    **attributes: attributes of `repjax.layers.RepConv`, such as `branches`, `strides` and `deploy`.

  Raises:
    InputError: the branches do not fit the number of channels or each other.

  Example:
    >>> import repjax
    >>> from flax import nnx
    >>> layer = repjax.nnx.RepConv(4, 8, branches=("conv3x3", "conv1x1"), rngs=nnx.Rngs(0))
    >>> layer.conv3x3.conv.kernel.shape
    (3, 3, 4, 8)
  """

  linen = layers.RepConv

  def __init__(self, in_features: int, features: int, *, rngs: nnx.Rngs, **attributes: Any):
    super().__init__(in_features, rngs, {"features": features, **attributes})


class RepNorm(_Module):
  """A batch norm that stands alone; its deploy form is a scale and a shift for each channel.

  The module has the attributes, the tree and the forward pass of `repjax.layers.RepNorm`. All
  attributes but `axis_name`, `running_variance`, `statistics` and `dtype` are fixed when the layer
  is built.

  Args:
    in_features: number of channels C.
    rngs: random streams, of which "params" draws the initial values.
    **attributes: attributes of `repjax.layers.RepNorm`, such as `epsilon` and `deploy`.
  """

  linen = layers.RepNorm

  def __init__(self, in_features: int, *, rngs: nnx.Rngs, **attributes: Any):
    super().__init__(in_features, rngs, attributes)


def load(model: nnx.Module, params: Tree, batch_stats: Tree | None = None) -> None:
  """Puts arrays into a model; every variable of the model gets a new value.

  The function fills a deploy form with the result of `repjax.reparameterize`. `nnx.update` would do
  so too, but leaves variables without a new value as they are, and accepts any shape.

  Args:
    model: an NNX model, or the result of `nnx.eval_shape`, which has shapes in place of arrays.
    params: a value for every `nnx.Param` of the model, and nothing else. Numbers of lists may be
      texts, as checkpoints have them.
    batch_stats: values for all `nnx.BatchStat` of the model, such as those of norms that are no
      layers of repjax. Statistics that the model does not have are left out, so that all
      statistics of the training form may come here.

  Raises:
    InputError: a variable has no value, a parameter has no place, shapes or dtypes differ, a value
      is no array, or the model is none of NNX.
  """
  if not isinstance(model, nnx.Module):
    raise InputError(f"model must be an nnx.Module, got {printable(repr(model), 60)}")
  check_arrays(("params",), pure(params))
  check_arrays(("batch_stats",), pure(batch_stats or {}))
  places, values = _by_path(nnx.state(model, nnx.Param)), _by_path(params)
  norms, statistics = _by_path(nnx.state(model, nnx.BatchStat)), _by_path(batch_stats or {})
  if not places:
    raise InputError(
      "the model has no parameters. A Linen model in nnx.bridge.ToNNX gets its parameters when "
      "lazy_init is called: nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(images)"
    )
  unfit = [
    *_missing("params", places, values),
    *(f"params {path} has no place in the model" for path in values.keys() - places.keys()),
    *_different(places, values),
  ]
  problems = [*unfit, *_missing("batch_stats", norms, statistics), *_different(norms, statistics)]
  if problems:
    # Parameters that fit alone are those of a model that keeps statistics, such as a training form.
    way_out = (
      "Pass the statistics too: repjax.nnx.load(model, params, batch_stats)"
      if not (unfit or statistics)
      else "A deploy form takes the result of repjax.reparameterize from a training form with the "
      "same attributes"
    )
    raise InputError(
      "the arrays do not fit the model: "
      f"{listed(sorted(problems), between='; ', longest=200)}. {way_out}"
    )
  flat = {path: values[name][1] for name, (path, _) in places.items()}
  flat |= {path: statistics[name][1] for name, (path, _) in norms.items()}
  nnx.update(model, unflatten_dict(flat))


def _dictionaries(tree: Any) -> Any:
  """Returns a tree with `nnx.Dict` for dictionaries, whose entries are attributes too."""
  if not isinstance(tree, Mapping):
    return tree
  return nnx.Dict({name: _dictionaries(below) for name, below in tree.items()})


def _by_path(tree: Tree) -> dict[str, tuple[tuple[Any, ...], Any]]:
  """Returns the path and the array of every leaf, by the path as a text."""
  return {"/".join(map(str, path)): (path, leaf) for path, leaf in leaves(pure(tree))}


def _missing(collection: str, places: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
  """Returns a sentence for every place that gets no value."""
  return [f"{collection} {path} is missing" for path in places.keys() - values.keys()]


def _different(places: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
  """Returns a sentence for every value that has a different shape or dtype than its place."""
  kinds = {
    path: [(jnp.shape(leaf), jnp.result_type(leaf)) for _, leaf in (places[path], values[path])]
    for path in places.keys() & values.keys()
  }
  return [
    f"{path} is {given[0]} {given[1]}, wanted {wanted[0]} {wanted[1]}"
    for path, (wanted, given) in kinds.items()
    if wanted != given
  ]
