"""The fold of a sum of branches into one convolution.

`forward` in `repjax.layers.branch_sum` makes the tree that the fold, `merge_branches`, reads. The
table says what the scopes of the tree hold.

| scope                  | holds                                                        |
|------------------------|--------------------------------------------------------------|
| `<branch>`             | `conv`, `bn`; one of them is missing where there is none     |
| `<branch>/first`       | `conv`, `bn` of the first of two steps                       |
| `<branch>/second`      | `conv`, `bn` of the second step                              |
| the layer              | `bn` after the sum, if there is one                          |

A `skip` holds nothing, so that the layer notes the name of the branch beside its statistics.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from repjax.algebra import (
  ConvParams,
  add,
  average_pool_kernel,
  bn_affine,
  compose,
  dilate_kernel,
  dirac_kernel,
  fuse_bn,
  identity_kernel,
  pad_kernel,
  wide_dtype,
)
from repjax.errors import InputError
from repjax.layers.base import holds_arrays, read_notes
from repjax.layers.composition import Layer, Path
from repjax.layers.grammar import POOLED, Branch, find, is_skip, layer_size, parse

Tree = Mapping[str, Any]


class Parts(NamedTuple):
  """A layer as a sum of convolutions of one size.

  Attributes:
    branches: name to the part of the branch in the fused convolution.
    shift: what a norm after the sum adds to the bias, (O,); None without such a norm.
  """

  branches: dict[str, ConvParams]
  shift: jax.Array | None

  def whole(self) -> ConvParams:
    """Returns the convolution that computes the layer."""
    whole = add(*self.branches.values())
    return whole if self.shift is None else ConvParams(whole.kernel, whole.bias + self.shift)


def merge_branches(params: Tree, stats: Tree, epsilon: Any) -> ConvParams:
  """Merges all branches into one convolution, without rounding to the dtype of the kernels.

  K = sum_b pad(K_b * scale_b);  b = sum_b bias_b.

  K_b of an identity and of a skip is the one-hot 1x1 kernel. Two steps are composed. A norm after
  the sum is one more norm of the whole.

  Args:
    params: {branch: {conv: {kernel, ...}, bn: {scale, bias}}}, as in the table at the top of this
      file.
    stats: {branch: {bn: {mean, var}}}, and notes.
    epsilon: number added to the variance by the batch norms, if no note says it.

  Returns:
    kernel (H, W, I/g, O), bias (O,), in the widest dtype involved, at least float32.

  Raises:
    InputError: a branch is no affine map.
    ValueError: the two trees do not hold the same branches, or shapes do not fit.
  """
  return branch_parts(params, stats, epsilon).whole()


def branch_parts(params: Tree, stats: Tree, epsilon: Any) -> Parts:
  """Returns the part of each branch in the fused convolution; arguments as in `merge_branches`."""
  names = branch_names(params, stats)
  stats, epsilon = read_notes(stats, epsilon)
  stats = {name: below for name, below in stats.items() if name not in set(names) - set(params)}
  _check_trees(params, stats)
  branches = [parse(name) for name in names]
  size = layer_size(branches)
  for branch in branches:
    _check_held(branch, params.get(branch.name, {}))
  like, parts = _channels(params), {}
  for branch in branches:
    held, running = params.get(branch.name, {}), stats.get(branch.name, {})
    parts[branch.name] = _placed(branch, _merged(branch, held, running, epsilon, like), size)
  _check_channels(parts)
  if "bn" not in params:
    return Parts(parts, None)
  scale, shift = bn_affine(params["bn"], stats["bn"], epsilon)
  return Parts({name: _scaled(part, scale) for name, part in parts.items()}, shift)


def branch_names(params: Tree, stats: Tree) -> list[str]:
  """Returns the names of the branches of a layer in training form."""
  noted = [str(name) for name in stats if name not in params and is_skip(name)]
  return [str(name) for name in params if name != "bn"] + noted


def skips(layer: Layer) -> list[str]:
  """Returns the branches that hold nothing, whose names a layer notes beside its statistics."""
  return [name for name in layer.branches if parse(name).kind == "skip"]


class _Channels(NamedTuple):
  """Input channels of one group, output channels, and dtype, of every branch of a layer."""

  inputs: int
  features: int
  dtype: Any


def _channels(params: Tree) -> _Channels:
  """Reads the channels off the first convolution."""
  for name, held in params.items():
    branch = find(name)
    if branch and branch.two_steps:
      first = held["first"]["conv"]["kernel"]
      last = held.get("second", {}).get("conv", {}).get("kernel", first)
      return _Channels(first.shape[2], last.shape[3], first.dtype)
    if branch and branch.has_kernel and "conv" in held:
      kernel = held["conv"]["kernel"]
      return _Channels(kernel.shape[2], kernel.shape[3], kernel.dtype)
  raise ValueError(f"no branch holds a kernel: {sorted(params)}")


def _merged(branch: Branch, held: Tree, stats: Tree, epsilon: Any, like: _Channels) -> ConvParams:
  """Returns a branch as one convolution of its own size, without dilation."""
  if branch.two_steps:
    first = _normed(_conv(held["first"]["conv"]), held["first"], stats["first"], epsilon)
    second, below = held.get("second", {}), stats.get("second", {})
    last = _conv(second["conv"]) if "conv" in second else _pool(like.features, branch, first)
    return _normed(compose(first, last), second, below, epsilon)
  if branch.has_kernel:
    return _normed(_conv(held["conv"]), held, stats, epsilon)
  if like.features % like.inputs:
    raise ValueError(
      f"no {branch.name} lies beside kernels of {like.inputs} inputs in each group and "
      f"{like.features} outputs, because {like.inputs} does not divide {like.features}"
    )
  # Such a branch maps channels to themselves, so that the number of groups is O / (I/g).
  make = average_pool_kernel if branch.kind == "avg" else identity_kernel
  groups, wide = like.features // like.inputs, wide_dtype(like.dtype)
  kernel = make(like.features, groups, branch.size, wide)
  return _normed(ConvParams(kernel, jnp.zeros((like.features,), wide)), held, stats, epsilon)


def _conv(held: Tree) -> ConvParams:
  """Returns a convolution, with a bias of zeros if it has none."""
  kernel = held["kernel"]
  if "gain" in held:
    kernel = dirac_kernel(kernel, held["diagonal"], held["gain"])
  bias = held.get("bias")
  return ConvParams(kernel, jnp.zeros(kernel.shape[-1:], kernel.dtype) if bias is None else bias)


def _pool(features: int, branch: Branch, like: ConvParams) -> ConvParams:
  """Returns an average pool as a depthwise convolution: one group for each channel."""
  kernel = average_pool_kernel(features, features, branch.size, like.kernel.dtype)
  return ConvParams(kernel, jnp.zeros((features,), like.kernel.dtype))


def _normed(conv: ConvParams, held: Tree, stats: Tree, epsilon: Any) -> ConvParams:
  """Merges the norm that a scope holds into a convolution; without a norm, returns it as it is."""
  return fuse_bn(conv, held["bn"], stats.get("bn", {}), epsilon) if "bn" in held else conv


def _placed(branch: Branch, conv: ConvParams, size: tuple[int, int]) -> ConvParams:
  """Returns the convolution of a branch with a kernel of the layer's size."""
  if branch.kind == POOLED:
    # The pool acts on pixels and the 1x1 on channels, so the two may change places. With the pool
    # second, `compose` applies. The bias is not pooled: zeros added at an odd edge come before the
    # 1x1 and its bias.
    pooled, _ = compose(conv, _pool(conv.kernel.shape[-1], branch, conv))
    # A 3x3 at stride 2 starts one pixel before the window, so taps 1 and 2 of 0, 1, 2 pool.
    return ConvParams(pad_kernel(pooled, size, before=(1, 1)), conv.bias)
  kernel = dilate_kernel(conv.kernel, branch.dilation) if branch.dilation > 1 else conv.kernel
  return ConvParams(pad_kernel(kernel, size), conv.bias)


def _scaled(conv: ConvParams, scale: jax.Array) -> ConvParams:
  """Multiplies the outputs of a convolution by (O,)."""
  dtype = wide_dtype(*(leaf.dtype for leaf in (*conv, scale)))
  scale = scale.astype(dtype)
  return ConvParams(
    conv.kernel.astype(dtype) * scale[None, None, None, :], conv.bias.astype(dtype) * scale
  )


def holds_branch(branch: Branch, held: Any) -> bool:
  """Tells if a scope holds convolutions and norms, as the scope of a branch does, and no more."""
  if not isinstance(held, Mapping) or not held:
    return False
  if branch.two_steps:
    return held.keys() <= {"first", "second"} and all(map(_holds_step, held.values()))
  return _holds_step(held)


def _holds_step(held: Any) -> bool:
  """Tells if a scope holds a convolution or a norm, or both, and no more."""
  return (
    isinstance(held, Mapping)
    and held.keys() <= {"conv", "bn"}
    and all(map(holds_arrays, held.values()))
  )


def norm_paths(tree: Tree, path: Path = ()) -> set[Path]:
  """Returns the paths of all norms in a tree."""
  found = set()
  for name, below in tree.items():
    if name == "bn":
      found.add((*path, "bn"))
    elif isinstance(below, Mapping) and name != "conv":
      found |= norm_paths(below, (*path, str(name)))
    elif name != "conv":
      found.add((*path, str(name)))
  return found


def _check_trees(params: Tree, stats: Tree) -> None:
  """Raises ValueError if parameters and statistics do not have the same norms."""
  wanted, found = norm_paths(params), norm_paths(stats)
  if wanted != found:
    raise ValueError(
      f"parameters have the norms {sorted(map('/'.join, wanted))}, statistics are of "
      f"{sorted(map('/'.join, found))}; the two trees do not belong together"
    )


def _check_channels(parts: Mapping[str, ConvParams]) -> None:
  """Raises ValueError if the branches do not map the same channels to the same channels."""
  channels = {name: part.kernel.shape[2:] for name, part in parts.items()}
  if len(set(channels.values())) > 1:
    raise ValueError(
      "its branches cannot be summed, because their input channels of a group and output channels "
      f"differ: {channels}. Is this a module of yours that runs convolutions one after the other? "
      "Then name its path in keep, or give its parts different names"
    )


def _check_held(branch: Branch, held: Tree) -> None:
  """Raises ValueError if a branch cannot be merged, or does not hold what the name says."""
  if branch.relu:
    raise InputError(
      f"{branch.name} has a ReLU inside of the branch, which is no affine map, so that no "
      "convolution computes the same. Use the training form as it is, or train without _relu"
    )
  if branch.two_steps:
    steps = {"first": ({"conv", "bn"}, held.get("first", {}))}
    if branch.kind == "conv":
      steps["second"] = ({"conv"}, held.get("second", {}))
    for name, (wanted, step) in steps.items():
      if not wanted <= step.keys() <= {"conv", "bn"}:
        raise ValueError(f"{branch.name}/{name} holds {sorted(wanted)}, got {sorted(step)}")
    return
  leaves = {"diagonal", "gain"} if branch.kind == "dirac" else set()
  if held.get("conv", {}).keys() & {"diagonal", "gain"} != leaves:
    raise ValueError(f"{branch.name}/conv holds {sorted({'kernel', *leaves})} and perhaps a bias")
  wanted = {"conv"} if branch.has_kernel else set() if branch.kind == "skip" else {"bn"}
  most = {"conv", "bn"} if branch.has_kernel else wanted
  if not wanted <= held.keys() <= most:
    raise ValueError(f"{branch.name} holds {sorted(most)}, got {sorted(held)}")
