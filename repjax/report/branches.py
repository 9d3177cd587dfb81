"""Measures what each branch of a layer contributes to the fused kernel."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from repjax import runs
from repjax.errors import InputError
from repjax.layers import RepConv, ScaledConv, fold_scaled_conv, recognize_scaled_conv
from repjax.layers.branches import branch_names, branch_parts
from repjax.layers.grammar import branch_order
from repjax.layers.scaled_conv import branch_kernels
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
    features, _ = trace(spec, deploy=True)
    layers = [_layer(path, variables["params"], {}, width) for path, width in features.items()]
    return Kernels(name, spec.name, None, layers)
  features, shapes = trace(spec)
  step, variables, _ = runs.read_best(workdir, shapes, verify=verify)
  trees = variables["params"], variables["batch_stats"]
  layers = [_layer(path, *trees, width) for path, width in features.items()]
  return Kernels(name, spec.name, step, layers)


def _is_inside_a_layer(module: nn.Module) -> bool:
  """Tells if a module is part of a layer with a fold."""
  parent = module.parent
  return isinstance(parent, nn.Module) and (
    isinstance(parent, LAYERS) or _is_inside_a_layer(parent)
  )


def trace(spec: ModelSpec, *, deploy: bool = False) -> tuple[dict[tuple[str, ...], int], Any]:
  """Returns the output channels of a model's layers of branches by path, and all shapes.

  The layers are RepConvs and ScaledConvs, in the order of calls. A layer inside another layer with
  a fold is left out, since that fold removes or absorbs it.
  """
  features = {}

  def note(method: Callable[..., Any], arguments: Any, keywords: Any, context: Any) -> Any:
    layer = context.module
    is_branched = context.method_name == "__call__" and isinstance(layer, RepConv | ScaledConv)
    if is_branched and not _is_inside_a_layer(layer):
      features.setdefault(layer.path, layer.features)
    return method(*arguments, **keywords)

  size = spec.preprocessing.image_size
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  # `ModelSpec.variable_shapes` would not do: its result is cached, and then nothing is called.
  with nn.intercept_methods(note):
    shapes = jax.eval_shape(spec.create_model(deploy=deploy).init, jax.random.key(0), images)
  return features, shapes


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


def _layer(path: tuple[str, ...], params: Tree, stats: Tree, features: int) -> FoldedLayer:
  """Measures the layer of branches at a path, in training form or deploy form."""
  for scope in path:
    params, stats = params[scope], stats.get(scope, {})
  is_deployed = "conv" in params
  names = () if is_deployed else tuple(branch_order(branch_names(params, stats)))
  measured = jax.device_get(_measure_fused(params) if is_deployed else _measure(params, stats))
  parts = {name: _kernel_stats(path, *leaves) for name, leaves in measured.items()}
  branches = {name: parts[name] for name in names} if len(names) > 1 else {}
  return FoldedLayer("/".join(path), features, parts[""], branches)


def _kernel_stats(path: tuple[str, ...], taps: Any, norm: Any) -> KernelStats:
  """Returns measured statistics in float64; refuses numbers that are not finite."""
  if not np.isfinite(norm):
    raise InputError(f"the weights of {'/'.join(path)} are not finite; has this run diverged?")
  return KernelStats(np.asarray(taps, np.float64), float(norm))


def _kernels(params: Tree, stats: Tree) -> dict[str, jax.Array]:
  """Returns the part of each branch in the fused kernel by name, and the fused kernel under ""."""
  if recognize_scaled_conv(params) is not None:
    fused = fold_scaled_conv(params, stats, EPSILON)["conv"]["kernel"]
    return {"": fused, **branch_kernels(params, stats, EPSILON)}
  parts = branch_parts(params, stats, EPSILON)
  kernels = {name: part.kernel for name, part in parts.branches.items()}
  return {"": parts.whole().kernel, **kernels}


@jax.jit
def _measure(params: Tree, stats: Tree) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Returns `_statistics` of each branch by name, and of the fused kernel under ""."""
  return {name: _statistics(kernel) for name, kernel in _kernels(params, stats).items()}


@jax.jit
def _measure_fused(params: Tree) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Returns `_statistics` of a layer in deploy form under ""."""
  return {"": _statistics(params["conv"]["kernel"])}


def _statistics(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the fields of `KernelStats` for a kernel (H, W, I/g, O)."""
  return jnp.abs(kernel).mean((2, 3)), jnp.sqrt(jnp.square(kernel).sum())
