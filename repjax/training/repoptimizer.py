"""The two networks of RepOptimizer: the plain one that learns, and the one whose scales it needs.

The hyper-search trains a network of ScaledConvs, on a small data set or on any other. Its scales
then tell the plain network how to begin, and how to learn: see `repjax.training.multipliers`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from repjax.algebra import BranchScales, scale_branches
from repjax.errors import InputError
from repjax.models import init
from repjax.recognition import layer_name
from repjax.schema import shown
from repjax.spec import ModelSpec
from repjax.training.multipliers import Scales, Tree, map_layers, with_kernel

_PLAIN = ("conv3x3",)


def search_spec(spec: ModelSpec) -> ModelSpec:
  """Returns the spec of the network of ScaledConvs that belongs to a plain network.

  Raises:
    InputError: the network is not plain, or has no ScaledConvs.
  """
  model = spec.create_model()
  if getattr(model, "scaled", True) or tuple(getattr(model, "branches", ())) != _PLAIN:
    raise InputError(
      "RepOptimizer trains a RepVGG whose blocks have the branch conv3x3 alone, got the model "
      f"{spec.name} with model_overrides {shown(dict(spec.overrides))}. Pass "
      f'--config.model_overrides.branches="{_PLAIN}" and no scaled, or a different config.optimizer'
    )
  others = {name: value for name, value in spec.overrides.items() if name != "branches"}
  return dataclasses.replace(spec, overrides={**others, "scaled": True})


def scale_shapes(spec: ModelSpec) -> dict[str, Any]:
  """Returns the shapes of the scales of a plain network, by layer.

  Raises:
    InputError: as in `search_spec`.
  """
  return scales_in(search_spec(spec).variable_shapes()["params"])


def scales_in(scaled: Tree) -> dict[str, Any]:
  """Returns the scales in the parameters of a network of ScaledConvs.

  Args:
    scaled: parameters, or a tree of their shapes, or the scales among them alone.

  Returns:
    A BranchScales for each layer, at the path of the layer in the plain network.
  """
  found = {}
  for name, value in scaled.items():
    if not isinstance(value, Mapping):
      continue
    if layer_name(name) == "ScaledConv":
      branches = (value.get(branch, {}).get("scale") for branch in BranchScales._fields)
      found[_plain_name(name)] = BranchScales(*branches)
    elif below := scales_in(value):
      found[name] = below
  return found


def initial_variables(
  spec: ModelSpec, variables: Mapping[str, Any], scales: Scales, key: jax.Array
) -> dict[str, Any]:
  """Returns the variables with which a plain network begins: its kernels are sums of branches.

  Args:
    spec: spec of the plain network.
    variables: freshly drawn variables of the plain network; all but its kernels stay.
    scales: scales of every layer.
    key: draws the kernels of the branches.
  """
  model, size = search_spec(spec).create_model(), spec.preprocessing.image_size
  branches = init(model, key, size)["params"]
  return {**variables, "params": merge_branches(variables["params"], branches, scales)}


def merge_branches(params: Tree, branches: Tree, scales: Scales) -> dict[str, Any]:
  """Returns parameters of a plain network with the kernels that compute the sums of branches.

  Args:
    params: parameters of the plain network.
    branches: parameters of the network of ScaledConvs, which give the kernels of the branches.
    scales: scales of every layer, in place of those in `branches`.
  """

  def merge(scales: BranchScales, layer: Tree, scaled: Tree) -> Tree:
    k3, k1 = (scaled[name]["conv"]["kernel"] for name in ("conv3x3", "conv1x1"))
    return with_kernel(layer, scale_branches(k3, k1, scales).astype(k3.dtype))

  return map_layers(merge, scales, params, _at_plain_paths(branches))


def _at_plain_paths(scaled: Tree) -> dict[str, Any]:
  """Returns a tree in which ScaledConvs have the names of the plain network's RepConvs."""
  return {
    _plain_name(name): _at_plain_paths(value) if isinstance(value, Mapping) else value
    for name, value in scaled.items()
  }


def _plain_name(scope: str) -> str:
  """Returns the name of the plain layer that belongs to a ScaledConv; other names stay."""
  if layer_name(scope) != "ScaledConv":
    return scope
  return scope.replace("ScaledConv", "RepConv", 1)
