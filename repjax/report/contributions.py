"""What the branches of a layer contribute to the one kernel that they become."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from repjax import runs
from repjax.errors import InputError
from repjax.reparam import FOLDS, layer_name
from repjax.spec import ModelSpec, load

Tree = Mapping[str, Any]

EPSILON = 1e-5  # what `reparameterize` takes if not told otherwise


class Part(NamedTuple):
  """A kernel (H, W, I/g, O) in short.

  Attributes:
    taps: (H, W), the mean over channels of the weights' absolute values.
    norm: the square root of the sum of the weights' squares.
  """

  taps: np.ndarray
  norm: float


class Layer(NamedTuple):
  """A RepConv in short.

  Attributes:
    path: of its scope, such as "stage1/block0/RepConv_0".
    channels: outputs O.
    fused: the kernel of the deploy form.
    branches: name to what that branch adds to it, in the order of `branch_order`; nothing where the
      layer is in deploy form already, or has one branch only, which is the fused kernel.
  """

  path: str
  channels: int
  fused: Part
  branches: dict[str, Part]

  def shares(self) -> dict[str, float]:
    """Each branch's part of the sum of the branches' norms; 0 where all are zero."""
    total = sum(part.norm for part in self.branches.values())
    return {name: part.norm / total if total else 0.0 for name, part in self.branches.items()}


class Kernels(NamedTuple):
  """Every RepConv of a folder's model, in the order in which a forward pass calls them.

  Attributes:
    name: of the folder.
    model: its model's name.
    step: of the checkpoint; None where the folder holds the deploy form only.
    layers: those that the deploy form keeps.
  """

  name: str
  model: str
  step: int | None
  layers: list[Layer]


def fold_branches(params: Tree, stats: Tree, epsilon: float = EPSILON) -> dict[str, Any]:
  """Folds a RepConv one branch at a time: kernels and biases that add up to those of the fold.

  A norm whose scale and bias are zero makes its branch nothing, and the fold is linear in these
  two: each entry is the fold of the layer with all other branches silenced. Exact up to rounding
  for every kind of branch.

  Args:
    params: {branch: {conv: {kernel}, bn: {scale, bias}}}, no conv in an identity.
    stats: {branch: {bn: {mean, var}}}.
    epsilon: of the batch norms.

  Returns:
    Branch to {kernel (H, W, I/g, O), bias (O,)}, at the size of the fused kernel.
  """
  names = branch_order(params)
  rows = np.eye(len(names))
  return {
    name: _fold(_weighted(params, names, row), stats, epsilon)["conv"]
    for name, row in zip(names, rows)
  }


def _fold(params: Tree, stats: Tree, epsilon: float) -> Any:
  return FOLDS["RepConv"](params, stats, epsilon)


def _weighted(params: Tree, names: Sequence[str], weights: Any) -> dict[str, Any]:
  """A RepConv whose branches' outputs are multiplied by weights, one for each of `names`."""

  def times(weight: Any, bn: Tree) -> Any:
    return jax.tree.map(lambda leaf: leaf * jnp.asarray(weight, leaf.dtype), bn)

  return {
    name: {**params[name], "bn": times(weight, params[name]["bn"])}
    for name, weight in zip(names, weights)
  }


def branch_order(names: Iterable[str]) -> list[str]:
  """Branch names as people expect them: larger kernels first, the identity last."""

  def key(name: str) -> tuple[bool, int, str]:
    size = name.removeprefix("conv").partition("_")[0].split("x")
    is_conv = name.startswith("conv")
    return not is_conv, -int(size[0]) * int(size[1]) if is_conv else 0, name

  return sorted(names, key=key)


def read_kernels(workdir: Path) -> Kernels:
  """Reads the model that a folder would be converted to, and takes each layer apart.

  Args:
    workdir: of a run or an import: its best checkpoint, with re-estimated statistics where it has
      some, else its deploy form.

  Raises:
    InputError: it holds no model, or a damaged one.
  """
  spec, name = ModelSpec.read(workdir), workdir.absolute().name
  if not runs.checkpoints(workdir):
    _, variables, _ = load(workdir)
    paths, _ = trace(spec, deploy=True)
    layers = [_layer(path, variables["params"], {}) for path in paths]
    return Kernels(name, spec.name, None, layers)
  paths, shapes = trace(spec)
  step, variables, _ = runs.read_best(workdir, shapes)
  layers = [_layer(path, variables["params"], variables["batch_stats"]) for path in paths]
  return Kernels(name, spec.name, step, layers)


def trace(spec: ModelSpec, *, deploy: bool = False) -> tuple[list[tuple[str, ...]], Any]:
  """Paths of a model's RepConvs in the order of their calls, and the shapes of its variables.

  Left out is what lies in scopes that a fold removes or makes something else of.
  """
  paths = []

  def note(method: Callable[..., Any], arguments: Any, keywords: Any, context: Any) -> Any:
    path = context.module.path
    layers = [layer_name(scope) for scope in path]
    is_call = context.method_name == "__call__" and path not in paths
    if is_call and layers[-1:] == ["RepConv"] and not any(layers[:-1]):
      paths.append(path)
    return method(*arguments, **keywords)

  size = spec.preprocessing.image_size
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  with nn.intercept_methods(note):  # `variable_shapes` may have traced the model before
    shapes = jax.eval_shape(spec.create_model(deploy=deploy).init, jax.random.key(0), images)
  return paths, shapes


def choose(layers: list[Layer], most: int = 6) -> list[Layer]:
  """Layers to show: one of each stage, spread over depth, with as many branches as there are.

  A stage is what layers have in common that are in one scope at the top of the tree. Where stages
  are many or few, the layers are chosen at equal distances.
  """
  candidates = [layer for layer in layers if len(layer.branches) > 1] or layers
  stages: dict[str, list[Layer]] = {}
  for layer in candidates:
    stages.setdefault(layer.path.split("/")[0], []).append(layer)
  if not min(3, len(candidates)) <= len(stages) <= most:
    places = np.linspace(0, len(candidates) - 1, min(most, len(candidates)))
    return [candidates[int(place)] for place in places.round()]
  return list(map(_middle, stages.values()))


def _middle(stage: list[Layer]) -> Layer:
  """The middle one of the layers that have the most branches."""
  most = max(len(layer.branches) for layer in stage)
  full = [layer for layer in stage if len(layer.branches) == most]
  return full[len(full) // 2]


def _layer(path: tuple[str, ...], params: Tree, stats: Tree) -> Layer:
  for scope in path:
    params, stats = params[scope], stats.get(scope, {})
  names = () if "conv" in params else tuple(branch_order(params))
  taps, norms = jax.device_get(_measure(params, stats, names) if names else _measure_fused(params))
  if not np.isfinite(norms).all():
    raise InputError(f"the weights of {'/'.join(path)} are not finite; has this run diverged?")
  parts = [Part(np.asarray(tap, np.float64), float(norm)) for tap, norm in zip(taps, norms)]
  channels = next(leaf.shape[-1] for leaf in jax.tree.leaves(params) if leaf.ndim == 4)
  several = names if len(names) > 1 else ()
  return Layer("/".join(path), channels, parts[0], dict(zip(several, parts[1:])))


@functools.partial(jax.jit, static_argnums=2)
def _measure(params: Tree, stats: Tree, names: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
  """`_in_short` of the fused kernel and of each branch's part in it, on a first axis."""

  def measure(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _in_short(_fold(_weighted(params, names, weights), stats, EPSILON))

  # One fold compiled, and one after the other in memory.
  rows = np.concatenate([np.ones((1, len(names))), np.eye(len(names))])
  return jax.lax.map(measure, jnp.asarray(rows, jnp.float32))


@jax.jit
def _measure_fused(params: Tree) -> tuple[jax.Array, jax.Array]:
  return jax.tree.map(lambda x: x[None], _in_short(params))


def _in_short(folded: Tree) -> tuple[jax.Array, jax.Array]:
  kernel = folded["conv"]["kernel"]
  return jnp.abs(kernel).mean((2, 3)), jnp.sqrt(jnp.square(kernel).sum())
