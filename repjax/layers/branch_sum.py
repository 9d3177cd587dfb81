"""The forward pass of a sum of branches: what the compact method of `RepConv` runs.

`repjax.layers.branches` has the fold of the same tree, and a table of its scopes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from repjax.algebra import bn_affine, wide_dtype
from repjax.layers import covariance
from repjax.layers.base import RepLayer
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
from repjax.layers.grammar import POOLED, Branch, layer_size, parse

if TYPE_CHECKING:
  from repjax.layers.rep_conv import RepConv


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
