"""The training of 1x1 branches without their outputs: statistics from the input's covariance.

The statistics of W'x follow from those of x: the mean is W'm and the variance diag(W' S W), with
the mean m and the covariance S of x. A norm after W'x is therefore known before W'x is computed:

  norm(W'x) = (W a)' (x - m) + b,  a = scale / sqrt(var + epsilon).

The identity is W = I. A sum of such branches is one 1x1 convolution with the kernel sum_b W_b a_b.
Its values, gradients and statistics are those of the branches one by one, to rounding. Neither the
outputs of the branches nor their normalised outputs are written, or kept for the backward pass.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from repjax.algebra import wide_dtype
from repjax.layers.batch_norm import Moments
from repjax.layers.composition import Layer, is_normed, pair
from repjax.layers.grammar import Branch

if TYPE_CHECKING:
  from repjax.layers.rep_conv import RepConv

PIXELS_PER_CHANNEL, PIXELS_PER_CHANNEL_ON_CPU = 128, 2
"""Fewest pixels of a batch for each input channel of a group at which "auto" merges branches.

Matrices of C^2 entries are computed, stored and read again. With few pixels they outweigh the maps
of C channels that merging saves. The number for CPUs comes from `benchmarks/covariance.py`. The
other number comes from programs compiled for an H100: with a quarter of the pixels, merging moves
more bytes than it saves.
"""


FEWEST_CHANNELS = 16
"""Fewest input channels of a group at which "auto" merges branches.

The variance diag(W' S W) loses twice the digits that W'x loses where the channels of x nearly
cancel. The three channels of a grey image do. With few channels there is little to save, too.
"""

MOST_PRODUCTS = 1 / 8
"""Largest share of a covariance in the products of a layer at which "auto" merges branches.

The share is 1/15 in a 3x3 convolution with a 1x1 and as many outputs as inputs. It is 2/3 in a 1x1
convolution alone, which takes longer with the covariance.
"""


class Input(NamedTuple):
  """Statistics of a map in g groups of channels, in at least float32.

  Attributes:
    mean: mean of each channel (g, C/g).
    covariance: covariance of the channels of each group (g, C/g, C/g).
    pixels: number of pixels that were averaged, those of all devices that share their statistics.
  """

  mean: jax.Array
  covariance: jax.Array
  pixels: int


def mergeable(layer: Layer, branches: Sequence[Branch]) -> list[Branch]:
  """Returns the branches of a layer that training could merge into one 1x1 convolution.

  These are the 1x1 convolutions and identities that end with a norm. An identity alone is merged
  with nothing.
  """
  found = [branch for branch in branches if is_pointwise(layer, branch)]
  return found if any(branch.has_kernel for branch in found) else []


def is_pointwise(layer: Layer, branch: Branch) -> bool:
  """Tells if a branch is a norm of W'x with one matrix W for every pixel, and nothing after it."""
  is_matrix = branch.kind in ("conv", "identity") and branch.size == (1, 1)
  return is_matrix and not branch.two_steps and not branch.relu and is_normed(layer, branch)


def merges(layer: Layer, branches: Sequence[Branch], shape: Sequence[int]) -> bool:
  """Tells if training merges the branches of a layer, as `statistics` of the layer says.

  Args:
    layer: the layer.
    branches: all branches of the layer.
    shape: shape (N, H, W, C) of the map that the branches see.
  """
  if layer.statistics != "auto":
    return layer.statistics == "covariance"
  *pixels, channels = shape
  inputs, outputs = channels // layer.groups, layer.features // layer.groups
  on_cpu = jax.default_backend() == "cpu"
  fewest = PIXELS_PER_CHANNEL_ON_CPU if on_cpu else PIXELS_PER_CHANNEL
  taps = sum(math.prod(branch.size) for branch in branches if branch.has_kernel)
  # For each pixel and group, a covariance takes twice C^2 products: forwards and backwards. The
  # convolutions take 3 C O for each tap.
  is_cheap = 2 * inputs**2 <= MOST_PRODUCTS * 3 * inputs * outputs * taps
  return is_cheap and inputs >= FEWEST_CHANNELS and math.prod(pixels) >= fewest * inputs


def merged_sum(
  x: jax.Array,
  layer: "RepConv",
  branches: Sequence[Branch],
  inside: Callable[[str, Callable[[nn.Module, Any], Any], Any], Any],
) -> jax.Array:
  """Computes the sum of merged branches in training, and updates their running statistics.

  Args:
    x: map (N, H, W, I) that the branches see, with the strides taken.
    layer: the layer, in whose compact method this is called.
    branches: result of `mergeable`.
    inside: calls a function of (module, value) in the scope of a branch.

  Returns:
    (N, H, W, O) in at least float32.
  """
  statistics = input_statistics(x, layer.groups, layer.axis_name)
  parts = [
    inside(branch.name, functools.partial(_part, layer=layer, branch=branch), statistics)
    for branch in branches
  ]
  kernel, bias = (functools.reduce(jnp.add, summands) for summands in zip(*parts))
  return centred_product(x, kernel, statistics.mean) + bias[None, None, None, :]


def _part(
  module: nn.Module, statistics: Input, layer: "RepConv", branch: Branch
) -> tuple[jax.Array, jax.Array]:
  """Returns the kernel of a branch with its norm (g, C, O/g), and the bias of the norm (O,)."""
  mean, covariance, pixels = statistics
  groups, inputs = mean.shape
  if branch.has_kernel:
    conv = module.get_variable("params", "conv")
    kernel = conv["kernel"].astype(mean.dtype).reshape(inputs, groups, -1).swapaxes(0, 1)
    means = _means(mean, kernel)
    seen = jnp.einsum("gij,gjo->gio", covariance, kernel, precision=lax.Precision.HIGHEST)
    # Rounding can make a variance negative.
    var = jnp.maximum(0.0, (kernel * seen).sum(1).ravel())
    if "bias" in conv:
      # Nothing but the running mean shows a bias in front of a norm.
      means += conv["bias"].astype(mean.dtype)
  else:
    kernel = jnp.eye(inputs, dtype=mean.dtype)[None]
    means, var = mean.ravel(), jnp.diagonal(covariance, axis1=1, axis2=2).ravel()
  factor, bias = layer.norm_of(Moments(means, var, pixels))
  return kernel * factor.reshape(groups, 1, -1), bias


def _means(mean: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns W'm (O,) of a mean (g, C/g) and a kernel (g, C/g, O/g)."""
  return jnp.einsum("gi,gio->go", mean, kernel, precision=lax.Precision.HIGHEST).ravel()


def centred_product(x: jax.Array, kernel: jax.Array, mean: jax.Array) -> jax.Array:
  """Applies a 1x1 convolution to a map without its mean, as W'x - W'm.

  In half precision, both have the same rounded kernel, so that a large mean cancels.

  Args:
    x: map (N, H, W, C).
    kernel: (g, C/g, O/g) in at least float32.
    mean: mean of the map (g, C/g), in the dtype of the kernel.

  Returns:
    (N, H, W, O) in the dtype of the kernel.
  """
  if x.dtype == kernel.dtype:
    product = pointwise(x, kernel, kernel.dtype)
  else:
    product = half_product(x, kernel)
    rounded = kernel.astype(x.dtype).astype(kernel.dtype)
    # Rounding has the derivative 1, so that the gradient of the kernel is not rounded too.
    kernel = kernel + lax.stop_gradient(rounded - kernel)
  return product - _means(mean, kernel)[None, None, None, :]


@jax.custom_vjp
def half_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Applies a 1x1 convolution in the half precision of the map, with sums in the kernel's dtype.

  Every product is one of two matrices in half precision, in the backward pass too. There the sums
  over pixels stay in the kernel's dtype: the part that belongs to the mean of the map, which may be
  large, is subtracted from them later.
  """
  return pointwise(x, kernel.astype(x.dtype), kernel.dtype)


def _half_product_forward(x, kernel):
  return half_product(x, kernel), (x, kernel)


def _half_product_backward(held, gradient):
  x, kernel = held
  gradient = gradient.astype(x.dtype)
  groups, inputs, outputs = kernel.shape
  to_x = pointwise(gradient, kernel.astype(x.dtype).swapaxes(1, 2), x.dtype)
  rows = x.reshape(-1, groups, inputs), gradient.reshape(-1, groups, outputs)
  return to_x, products(*rows, kernel.dtype)


half_product.defvjp(_half_product_forward, _half_product_backward)


def pointwise(x: jax.Array, kernel: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Applies a 1x1 convolution: (N, H, W, C) and a kernel (g, C/g, O/g) to (N, H, W, O)."""
  groups, inputs, _ = kernel.shape
  if groups == 1:
    dimensions = (((3,), (0,)), ((), ()))
    return lax.dot_general(x, kernel[0], dimensions, preferred_element_type=dtype)
  return lax.conv_general_dilated(
    x,
    kernel.swapaxes(0, 1).reshape(1, 1, inputs, -1),
    (1, 1),
    "VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
    preferred_element_type=dtype,
  )


def strided(x: jax.Array, strides: Any) -> jax.Array:
  """Returns every so many rows and columns of (N, H, W, C), as a 1x1 convolution sees them."""
  down, across = pair(strides)
  return x if (down, across) == (1, 1) else x[:, ::down, ::across]


def input_statistics(x: jax.Array, groups: int, axis_name: str | None) -> Input:
  """Returns the statistics of a map.

  Args:
    x: (N, H, W, C).
    groups: number of groups of channels.
    axis_name: name of a mapped axis over which the statistics are averaged; None: none.
  """
  wide, pixels = wide_dtype(x.dtype), x.size // x.shape[-1]
  mean = x.astype(wide).mean((0, 1, 2)).reshape(groups, -1)
  square = second_moments(x.reshape(pixels, groups, -1))
  if axis_name is not None:
    mean, square = lax.pmean((mean, square), axis_name)
    pixels *= lax.axis_size(axis_name)
  return Input(mean, square - mean[:, :, None] * mean[:, None, :], pixels)


@jax.custom_jvp
def second_moments(x: jax.Array) -> jax.Array:
  """Returns E[x_i x_j] for the channels of each group: (P, g, C) to (g, C, C), at least float32.

  The rule below gives the backward pass one product, x (G + G'). That of `products` has two.
  """
  # GPUs would round float32 to fewer digits, which a large mean needs.
  return products(x, x, wide_dtype(x.dtype), lax.Precision.HIGHEST) / x.shape[0]


@second_moments.defjvp
def _second_moments_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  # In the dtype of x, so that the backward pass multiplies matrices of one dtype.
  half = products(dx, x, x.dtype)
  tangent = (half + half.swapaxes(1, 2)).astype(wide_dtype(x.dtype)) / x.shape[0]
  return second_moments(x), tangent


def products(
  x: jax.Array,
  y: jax.Array,
  dtype: jax.typing.DTypeLike,
  precision: lax.Precision | None = None,
) -> jax.Array:
  """Returns the sums over pixels of x_i y_j, for each group: twice (P, g, C) to (g, C, C)."""
  how: Any = {"preferred_element_type": dtype, "precision": precision}
  if x.shape[1] == 1:
    return lax.dot_general(x[:, 0], y[:, 0], (((0,), (0,)), ((), ())), **how)[None]
  return lax.dot_general(x, y, (((0,), (0,)), ((1,), (1,))), **how)
