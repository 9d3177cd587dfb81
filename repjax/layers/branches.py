"""The forward pass of a sum of branches, and its fold into one convolution, side by side.

`forward` is what the compact method of `RepConv` runs. The fold, `merge_branches`, reads the tree
of such a layer. The table says what the scopes of the tree hold.

| scope                  | holds                                                        |
|------------------------|--------------------------------------------------------------|
| `<branch>`             | `conv`, `bn`; one of them is missing where there is none     |
| `<branch>/first`       | `conv`, `bn` of the first of two steps                       |
| `<branch>/second`      | `conv`, `bn` of the second step                              |
| the layer              | `bn` after the sum, if there is one                          |

A `skip` holds nothing, so that the layer notes the name of the branch beside its statistics.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

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
from repjax.layers import covariance
from repjax.layers.base import RepLayer, holds_arrays, read_notes
from repjax.layers.composition import (
  Conv,
  Layer,
  Path,
  centred_padding,
  check,
  convolutions,
  is_normed,
  is_normed_after_sum,
  layer_padding,
  pair,
)
from repjax.layers.convolution import convolution
from repjax.layers.grammar import POOLED, Branch, find, is_skip, layer_size, parse

if TYPE_CHECKING:
  from repjax.layers.rep_conv import RepConv

Tree = Mapping[str, Any]


# The forward pass.


def forward(x: jax.Array, layer: "RepConv", train: bool, where: str) -> jax.Array:
  """Computes a layer in either form: y = sum_b branch_b(x), perhaps with a norm after the sum.

  Args:
    x: (N, H, W, I).
    layer: the layer, in whose compact method this is called.
    train: normalise with the statistics of the batch and update the running ones.
    where: name of the layer for messages.

  Returns:
    (N, H', W', O). The training form sums in at least float32 and returns the sum so.

  Raises:
    InputError: the branches do not fit the input or each other.
  """
  check(layer, x.shape, where)
  branches = [parse(name) for name in layer.branches]
  run = _Run(layer, train, layer_size(branches), convolutions(layer, x.shape[-1]))
  source = run.padded(x)
  if layer.deploy:
    return run.conv(source, ("conv",))
  outputs = []
  if train and not layer.is_initializing():
    merged, total = run.merged(source, branches)
    branches = [branch for branch in branches if branch not in merged]
    outputs += [total] if merged else []
  for branch in branches:
    y = run.two_steps(x, branch) if branch.two_steps else run.one_step(source, branch)
    outputs.append(jax.nn.relu(y) if branch.relu else y)
  total = sum(outputs[1:], outputs[0])
  return run.norm(total) if is_normed_after_sum(layer) else total


class _Inside(nn.Module):
  """The scope of a branch or of a step.

  Attributes:
    function: function of (this module, x) that runs in the scope.
  """

  function: Callable[[nn.Module, jax.Array], Any]

  @nn.compact
  def __call__(self, x: jax.Array) -> Any:
    return self.function(self, x)


class _Run(NamedTuple):
  """One call of a layer: what its branches share.

  Linen puts the submodules that a method builds into the scope of the module that is running.

  Attributes:
    layer: the layer.
    train: as in `forward`.
    size: size of the layer's kernel.
    convs: the convolutions of the layer, by path.
  """

  layer: "RepConv"
  train: bool
  size: tuple[int, int]
  convs: Mapping[Path, Conv]

  def conv(self, x: jax.Array, path: Path) -> jax.Array:
    """Applies the convolution at a path of the layer, in the scope `conv`."""
    return convolution(self.convs[path], **self.layer.dtypes())(name="conv")(x)

  def norm(self, x: jax.Array) -> jax.Array:
    """Applies a batch norm in the scope `bn`; returns at least float32."""
    # A RepConv has an attribute in the place of this method.
    return RepLayer.norm(self.layer, x, self.train)

  def padded(self, x: jax.Array) -> jax.Array:
    """Pads a map for the layer's kernel in other modes than zeros; smaller kernels crop it."""
    # A convolution pads with zeros by itself.
    if self.layer.padding_mode == "constant":
      return x
    return _pad(x, layer_padding(self.layer, self.size), self.layer.padding_mode)

  def padding(self, branch: Branch) -> tuple[int, int]:
    """Returns the padding of zeros for the kernel of a branch."""
    return centred_padding(self.layer, self.size, branch.span)

  def step(self, x: jax.Array, path: Path, *, normed: bool) -> jax.Array:
    """Applies the convolution of a scope and a norm, where there are such, in at least float32."""
    if (*path, "conv") in self.convs:
      x = self.conv(x, (*path, "conv"))
    return self.norm(x) if normed else _wide(x)

  def merged(self, x: jax.Array, branches: Sequence[Branch]) -> tuple[list[Branch], Any]:
    """Computes in training the branches that merge into one 1x1 convolution, perhaps none.

    Args:
      x: padded map.
      branches: all branches of the layer.

    Returns:
      The merged branches and their sum, None without any.
    """
    found = covariance.mergeable(self.layer, branches)
    if not found:
      return [], None
    seen = covariance.strided(_pad(x, self.padding(found[0])), self.layer.strides)
    if not covariance.merges(self.layer, branches, seen.shape):
      return [], None

    def inside(name: str, function: Callable[[nn.Module, Any], Any], value: Any) -> Any:
      return _Inside(function, name=name)(value)

    return found, covariance.merged_sum(seen, self.layer, found, inside)

  def one_step(self, x: jax.Array, branch: Branch) -> jax.Array:
    """Applies a branch of one step to a padded map."""
    seen = _seen(x, self.layer, branch, self.padding(branch))
    if branch.kind == "skip":
      return _wide(seen)
    normed = is_normed(self.layer, branch)

    def run(_: nn.Module, x: jax.Array) -> jax.Array:
      return self.step(x, (branch.name,), normed=normed)

    return _Inside(run, name=branch.name)(seen)

  def two_steps(self, x: jax.Array, branch: Branch) -> jax.Array:
    """Applies a branch of two steps to a map as it is."""
    last, normed = (branch.name, "second"), is_normed(self.layer, branch)

    def first(module: nn.Module, x: jax.Array) -> tuple[jax.Array, jax.Array]:
      y = self.step(x, (branch.name, "first"), normed=True)
      return y, _of_zero(self.layer, module)

    def second(_: nn.Module, y: jax.Array) -> jax.Array:
      return self.step(y, last, normed=normed)

    def run(_: nn.Module, x: jax.Array) -> jax.Array:
      y, zero = _Inside(first, name="first")(x)
      # The first step acts on single pixels. Modes that repeat pixels may therefore pad after it.
      y = _pad(self.padded(y), self.padding(branch), border=zero)
      if branch.kind == "avg":
        y = _average(y, self.layer, branch)
      is_bare = not normed and (*last, "conv") not in self.convs
      return y if is_bare else _Inside(second, name="second")(y)

    return _Inside(run, name=branch.name)(x)


def _seen(x: jax.Array, layer: Layer, branch: Branch, padding: tuple[int, int]) -> jax.Array:
  """Returns what the convolution or the norm of a branch of one step is applied to."""
  if branch.kind == POOLED:
    return _halve(x)
  if branch.kind == "avg":
    return _average(_pad(_wide(x), padding), layer, branch)
  return _pad(x, padding) if branch.is_input else x


def _of_zero(layer: "RepConv", module: nn.Module) -> jax.Array:
  """Returns what the convolution and the norm in a scope make of zeros at inference, (O,).

  Training uses this value too, as in the code of Diverse Branch Block. No gradient flows into the
  statistics, which training moves towards those of the batch.

  Args:
    layer: the layer, which holds the note of epsilon.
    module: module of the scope.
  """
  conv, bn = (module.get_variable("params", name, {}) for name in ("conv", "bn"))
  stats = jax.lax.stop_gradient(dict(module.get_variable("batch_stats", "bn", {})))
  epsilon = layer.get_variable("batch_stats", "epsilon", layer.epsilon)
  scale, shift = bn_affine(bn, stats, epsilon)
  bias = conv.get("bias")
  return shift if bias is None else bias.astype(scale.dtype) * scale + shift


def _wide(x: jax.Array) -> jax.Array:
  """Casts to at least float32."""
  return x.astype(wide_dtype(x.dtype))


def _pad(
  x: jax.Array,
  padding: tuple[int, int],
  mode: str = "constant",
  border: jax.Array | None = None,
) -> jax.Array:
  """Adds pixels on each side of (N, H, W, C), or removes them where `padding` is negative.

  The new pixels are zero, or `border` (C,).
  """
  if padding == (0, 0):
    return x
  if mode != "constant":
    rows, columns = ((pad, pad) for pad in padding)
    return jnp.pad(x, ((0, 0), rows, columns, (0, 0)), mode=mode)
  edges = [(0, 0, 0), *((pad, pad, 0) for pad in padding), (0, 0, 0)]
  y = jax.lax.pad(x, jnp.zeros((), x.dtype), edges)
  if border is None or max(padding) <= 0:
    return y
  is_new = jax.lax.pad(jnp.zeros((1, *x.shape[1:3], 1), x.dtype), jnp.ones((), x.dtype), edges)
  return y + is_new * border.astype(x.dtype)[None, None, None, :]


def _average(x: jax.Array, layer: Layer, branch: Branch) -> jax.Array:
  """Averages windows at the strides and the dilation of the layer, without padding."""
  sums = jax.lax.reduce_window(
    x,
    np.zeros((), x.dtype),  # under jit, a zero of JAX would hide from its gradient that this sums
    jax.lax.add,
    (1, *branch.size, 1),
    (1, *pair(layer.strides), 1),
    "VALID",
    window_dilation=(1, *pair(layer.dilation), 1),
  )
  return sums / (branch.size[0] * branch.size[1])


def _halve(x: jax.Array) -> jax.Array:
  """Averages 2x2 windows at stride 2.

  An odd edge is filled with zeros that count, so that every mean is over four pixels. The pool is
  then a convolution with four taps of 1/4 at every size of the map.
  """
  n, height, width, channels = x.shape
  down, across = -(-height // 2), -(-width // 2)
  edges = [(0, 0, 0), (0, height % 2, 0), (0, width % 2, 0), (0, 0, 0)]
  x = jax.lax.pad(x, jnp.zeros((), x.dtype), edges)
  return x.reshape(n, down, 2, across, 2, channels).mean((2, 4))  # (N, ceil(H/2), ceil(W/2), C)


# The fold.


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
