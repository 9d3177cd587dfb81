"""Measures what each branch of a layer contributes to the fused kernel."""

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from repjax import runs
from repjax.errors import InputError
from repjax.layers import RepConv, ScaledConv, fold_rep_conv, fold_scaled_conv
from repjax.recognition import LAYERS
from repjax.spec import ModelSpec, load

Tree = Mapping[str, Any]

EPSILON = 1e-5  # The default of `reparameterize`.


class KernelStats(NamedTuple):
  """Statistics of a kernel (H, W, I/g, O).

  Attributes:
    taps: mean absolute weight of each tap over all channels, (H, W).
    norm: square root of the sum of the squared weights.
  """

  taps: np.ndarray
  norm: float


class FoldedLayer(NamedTuple):
  """Statistics of a RepConv or a ScaledConv after the fold.

  Attributes:
    path: path of its scope, such as "stage1/block0/RepConv_0".
    channels: output channels O.
    fused: statistics of the kernel in deploy form.
    branches: name to the statistics of the branch's share of that kernel, in the order of
      `branch_order`. Empty for a layer in deploy form, and for a layer with a single branch.
  """

  path: str
  channels: int
  fused: KernelStats
  branches: dict[str, KernelStats]

  def shares(self) -> dict[str, float]:
    """Returns each branch's share of the sum of all branches' norms; 0 if all norms are 0."""
    total = sum(stats.norm for stats in self.branches.values())
    return {name: stats.norm / total if total else 0.0 for name, stats in self.branches.items()}


class Kernels(NamedTuple):
  """Statistics of every RepConv and ScaledConv of a model, in the order of the forward pass.

  Attributes:
    name: name of the folder.
    model: name of the model.
    step: step of the checkpoint; None if the folder holds the deploy form only.
    layers: the layers that the deploy form keeps.
  """

  name: str
  model: str
  step: int | None
  layers: list[FoldedLayer]


def fold_weighted(params: Tree, stats: Tree, weights: Mapping[str, Any]) -> Any:
  """Folds a RepConv in which the output of each branch is multiplied by a weight.

  The fold is linear in the scales and biases of the batch norms. With weight 1 for one branch and 0
  for all others, the result is therefore the part of this branch in the fused kernel and bias. The
  parts add up to the whole fold. This is exact up to rounding for every kind of branch.

  Args:
    params: {branch: {conv: {kernel}, bn: {scale, bias}}}; an identity has no conv.
    stats: {branch: {bn: {mean, var}}}.
    weights: branch to its weight, for every branch.

  Returns:
    {conv: {kernel (H, W, I/g, O), bias (O,)}}, as the fold returns it.
  """

  def times(weight: Any, bn: Tree) -> Any:
    return jax.tree.map(lambda leaf: leaf * jnp.asarray(weight, leaf.dtype), bn)

  weighted = {
    name: {**params[name], "bn": times(weight, params[name]["bn"])}
    for name, weight in weights.items()
  }
  return fold_rep_conv(weighted, stats, EPSILON)


def fold_weighted_scales(params: Tree, stats: Tree, weights: Mapping[str, Any]) -> Any:
  """Folds a ScaledConv in which the output of each branch is multiplied by a weight.

  The kernel is linear in the scales of the branches, as in `fold_weighted`. The one norm after the
  sum stays, so the bias is not cut into parts.

  Args:
    params: {branch: {conv: {kernel}, scale}, bn: {scale, bias}}; an identity has no conv.
    stats: {bn: {mean, var}}.
    weights: branch to its weight, for every branch.

  Returns:
    {conv: {kernel (3, 3, I/g, O), bias (O,)}}, as the fold returns it.
  """
  weighted = {
    name: {**params[name], "scale": params[name]["scale"] * jnp.asarray(weight, jnp.float32)}
    for name, weight in weights.items()
  }
  return fold_scaled_conv({**params, **weighted}, stats, EPSILON)


def branch_order(names: Iterable[str]) -> list[str]:
  """Sorts branch names: larger kernels first, the identity last."""

  def key(name: str) -> tuple[bool, int, str]:
    size = name.removeprefix("conv").partition("_")[0].split("x")
    is_conv = name.startswith("conv")
    return not is_conv, -int(size[0]) * int(size[1]) if is_conv else 0, name

  return sorted(names, key=key)


def read_kernels(workdir: Path, *, verify: bool = True) -> Kernels:
  """Reads the model that a conversion would use, and measures each of its layers.

  This is the best checkpoint, with re-estimated statistics if there are any. A folder without a
  checkpoint gives its deploy form.

  Args:
    workdir: folder of a run or an import.
    verify: compare every file that is read with its checksum.

  Raises:
    InputError: the folder holds no model, or a damaged model.
  """
  spec, name = ModelSpec.read(workdir, verify=verify), workdir.absolute().name
  if not runs.checkpoints(workdir):
    _, variables, _ = load(workdir, verify=verify)
    paths, _ = trace(spec, deploy=True)
    layers = [_layer(path, variables["params"], {}) for path in paths]
    return Kernels(name, spec.name, None, layers)
  paths, shapes = trace(spec)
  step, variables, _ = runs.read_best(workdir, shapes, verify=verify)
  layers = [_layer(path, variables["params"], variables["batch_stats"]) for path in paths]
  return Kernels(name, spec.name, step, layers)


def _is_inside_a_layer(module: nn.Module) -> bool:
  """Tells if a module is part of a layer with a fold."""
  parent = module.parent
  return isinstance(parent, nn.Module) and (
    isinstance(parent, LAYERS) or _is_inside_a_layer(parent)
  )


def trace(spec: ModelSpec, *, deploy: bool = False) -> tuple[list[tuple[str, ...]], Any]:
  """Returns the paths of a model's layers of branches in the order of calls, and all shapes.

  The layers are RepConvs and ScaledConvs. A layer inside another layer with a fold is left out,
  since that fold removes or absorbs it.
  """
  paths = []

  def note(method: Callable[..., Any], arguments: Any, keywords: Any, context: Any) -> Any:
    layer = context.module
    is_call = context.method_name == "__call__" and layer.path not in paths
    if is_call and isinstance(layer, RepConv | ScaledConv) and not _is_inside_a_layer(layer):
      paths.append(layer.path)
    return method(*arguments, **keywords)

  size = spec.preprocessing.image_size
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  # `ModelSpec.variable_shapes` would not do: its result is cached, and then nothing is called.
  with nn.intercept_methods(note):
    shapes = jax.eval_shape(spec.create_model(deploy=deploy).init, jax.random.key(0), images)
  return paths, shapes


def choose(layers: list[FoldedLayer], most: int = 6) -> list[FoldedLayer]:
  """Chooses the layers to show: one of each stage, with as many branches as possible.

  The layers of a stage share a scope at the top of the tree. With too many or too few stages, the
  layers are chosen at equal distances over the depth.
  """
  candidates = [layer for layer in layers if len(layer.branches) > 1] or layers
  stages: dict[str, list[FoldedLayer]] = {}
  for layer in candidates:
    stages.setdefault(layer.path.split("/")[0], []).append(layer)
  if not min(3, len(candidates)) <= len(stages) <= most:
    places = np.linspace(0, len(candidates) - 1, min(most, len(candidates)))
    return [candidates[int(place)] for place in places.round()]
  return list(map(_middle, stages.values()))


def _middle(stage: list[FoldedLayer]) -> FoldedLayer:
  """Returns the middle layer among those with the most branches."""
  most = max(len(layer.branches) for layer in stage)
  full = [layer for layer in stage if len(layer.branches) == most]
  return full[len(full) // 2]


def _layer(path: tuple[str, ...], params: Tree, stats: Tree) -> FoldedLayer:
  """Measures the layer of branches at a path, in training form or deploy form."""
  for scope in path:
    params, stats = params[scope], stats.get(scope, {})
  names = () if "conv" in params else tuple(branch_order(params.keys() - {"bn"}))
  taps, norms = jax.device_get(_measure(params, stats, names) if names else _measure_fused(params))
  if not np.isfinite(norms).all():
    raise InputError(f"the weights of {'/'.join(path)} are not finite; has this run diverged?")
  measured = [
    KernelStats(np.asarray(tap, np.float64), float(norm)) for tap, norm in zip(taps, norms)
  ]
  channels = next(leaf.shape[-1] for leaf in jax.tree.leaves(params) if leaf.ndim == 4)
  several = names if len(names) > 1 else ()
  branches = dict(zip(several, measured[1:]))
  return FoldedLayer("/".join(path), channels, measured[0], branches)


@functools.partial(jax.jit, static_argnums=2)
def _measure(params: Tree, stats: Tree, names: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
  """Returns `_statistics` of the fused kernel and of each branch, stacked on a first axis."""
  fold = fold_weighted_scales if "bn" in params else fold_weighted

  def measure(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _statistics(fold(params, stats, dict(zip(names, weights))))

  # The first row keeps all branches, row i only branch i. `lax.map` compiles one fold and runs the
  # rows one after another, so that only one fused kernel is in memory.
  rows = np.concatenate([np.ones((1, len(names))), np.eye(len(names))])
  return jax.lax.map(measure, jnp.asarray(rows, jnp.float32))


@jax.jit
def _measure_fused(params: Tree) -> tuple[jax.Array, jax.Array]:
  """Returns `_statistics` of a layer in deploy form, with a first axis of size one."""
  return jax.tree.map(lambda x: x[None], _statistics(params))


def _statistics(folded: Tree) -> tuple[jax.Array, jax.Array]:
  """Returns the fields of `KernelStats` for a folded layer."""
  kernel = folded["conv"]["kernel"]
  return jnp.abs(kernel).mean((2, 3)), jnp.sqrt(jnp.square(kernel).sum())
