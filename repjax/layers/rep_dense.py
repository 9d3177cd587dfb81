"""RepDense, the layer of RepMLP: a fully connected layer over tiles, trained with convolutions.

Scopes of the training form: `fc` (`dense/kernel` and `bn`) and, with local kernels, `local`, a
RepConv over each tile by itself. Deploy form: `dense`, with `kernel` and `bias`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from repjax.algebra import AffineParams, bn_affine, conv_to_dense, wide_dtype
from repjax.errors import InputError
from repjax.layers.base import (
  RepLayer,
  Tree,
  kernel_and_bias,
  leading_axes,
  read_notes,
  refuse_training,
)
from repjax.layers.branches import branch_parts, merge_branches
from repjax.layers.composition import pair
from repjax.layers.drawing import draw
from repjax.layers.linear import TILE_AXES, bias_init, tile_kernel_init
from repjax.layers.remainder import identity_norm, scaled_branch, share_of
from repjax.layers.rep_conv import RepConv


def check_tiles(where: str, shape: Sequence[int], tile: tuple[int, int]) -> None:
  """Raises InputError if maps (N, H, W, C) do not divide into tiles."""
  fits = len(shape) == 4 and min(tile) > 0 and not (shape[1] % tile[0] or shape[2] % tile[1])
  if not fits or not min(shape[1:3]):
    raise InputError(
      f"{where}: maps of shape {tuple(shape)} do not divide into tiles of {tile[0]}x{tile[1]} "
      "pixels; H and W of (N, H, W, C) must be multiples of the tile's height and width. Change "
      "the image size or the tile"
    )


def partition(x: jax.Array, tile: tuple[int, int], rows: int = 1) -> jax.Array:
  """Cuts maps (N, H, W, rows * C) into tiles (N * H/h * W/w * rows, h, w, C).

  Tiles of an image lie one after the other, from left to right and then downwards. With `rows`, the
  channels of each tile are cut into as many equal parts, which become tiles of their own.
  """
  n, height, width, channels = x.shape
  down, across = height // tile[0], width // tile[1]
  x = x.reshape(n, down, tile[0], across, tile[1], rows, channels // rows)
  x = x.transpose(0, 1, 3, 5, 2, 4, 6)  # (N, H/h, W/w, rows, h, w, C)
  return x.reshape(-1, *tile, channels // rows)


def unpartition(tiles: jax.Array, size: tuple[int, int], rows: int = 1) -> jax.Array:
  """Puts tiles back together: the inverse of `partition` for maps of H x W pixels.

  Args:
    tiles: (N * H/h * W/w * rows, h, w, C).
    size: H and W.
    rows: as in `partition`.

  Returns:
    (N, H, W, rows * C).
  """
  _, height, width, channels = tiles.shape
  down, across = size[0] // height, size[1] // width
  x = tiles.reshape(-1, down, across, rows, height, width, channels)
  x = x.transpose(0, 1, 4, 2, 5, 3, 6)  # (N, H/h, h, W/w, w, rows, C)
  return x.reshape(-1, *size, rows * channels)


class _TileDense(nn.Module):
  """A fully connected layer over tiles: each group of channels has one matrix.

  Attributes:
    features: number of output channels of one group.
    use_bias: add a bias.
    dtype: dtype of the computation and of the result.
    param_dtype: dtype of the parameters.
  """

  features: int
  use_bias: bool
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (g, M, h, w, C/g) to (g, M, h, w, O/g)."""
    groups, _, height, width, inputs = x.shape
    shape = (groups, height, width, inputs, height, width, self.features)
    kernel = self.param("kernel", tile_kernel_init, shape, self.param_dtype)
    # The kernel's axes are in the order in which the product reads them: reshaping copies nothing.
    matrices = kernel.astype(self.dtype).reshape(groups, height * width * inputs, -1)
    rows = x.astype(self.dtype).reshape(groups, -1, height * width * inputs)
    y = lax.batch_matmul(rows, matrices).reshape(groups, -1, *shape[4:])
    if self.use_bias:
      bias = self.param("bias", bias_init(shape), (groups, *shape[4:]), self.param_dtype)
      y = y + bias.astype(self.dtype)[:, None]
    return y


class _DenseBranch(RepLayer):
  """The fully connected layer without bias, and the batch norm after it.

  Attributes:
    features: number of output channels of one group.
    norm_axis: axes of (g, M, h, w, O/g) over which the norm does not average.
  """

  features: int
  norm_axis: tuple[int, ...]

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (g, M, h, w, C/g) to (g, M, h, w, O/g)."""
    y = _TileDense(self.features, False, **self.dtypes(), name="dense")(x)
    return self.norm(y, train, axis=self.norm_axis)


class RepDense(RepLayer):
  """A fully connected layer over tiles, plus convolutions over the same tiles.

  y = BN(FC(tile)) + sum_k BN_k(conv_kxk(tile)), for each tile of h x w pixels and all its channels.
  The convolutions see zeros beyond the tile's border, so each is a matrix over the tile too. The
  deploy form is one fully connected layer with bias. It is exact for every tile, group count, odd
  kernel size, and number of input and output channels. Both forms run the layer as one matrix
  product batched over groups, never as a dense matrix with zeros between groups. Norms and the sum
  are computed in at least float32.

  Without share-sets (RepMLP, 2021) the norm after the fully connected layer has statistics for
  each output pixel and channel. With S share-sets (RepMLPNet, 2022) channel c of each tile passes
  through the layer of set c mod S, which sees that channel alone. Norms then have statistics for
  each set.

  Attributes:
    features: number of output channels O.
    tile: height and width of a tile in pixels, one number or (h, w).
    groups: number of groups g of the fully connected layer and the convolutions. Stays 1 with
      share-sets.
    share_sets: number of share-sets S. None gives every channel weights of its own.
    local_kernels: odd sizes k of the convolutions (the Local Perceptron), none or more.

  References:
    Ding et al., RepMLP, 2021, sections 3.1 to 3.3. https://arxiv.org/abs/2105.01883
    Ding et al., RepMLPNet, CVPR 2022, section 3, for share-sets. https://arxiv.org/abs/2112.11081
  """

  features: int
  tile: int | Sequence[int]
  groups: int = 1
  share_sets: int | None = None
  local_kernels: Sequence[int] = (1, 3, 5)

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, H, W, C) to (N, H, W, O).

    Raises:
      InputError: H or W is no multiple of the tile's, channels do not divide into groups or
        share-sets, or a kernel size is even or repeated.
      ValueError: `train` in deploy form.
    """
    refuse_training(self.deploy, train)
    self._check(x)
    tile, size = pair(self.tile), (x.shape[1], x.shape[2])
    # With share-sets each set is a group of one channel. Channels are cut into `rows` parts of S
    # channels, one for each set. The parts become tiles of their own, and so share the weights.
    groups = self.share_sets or self.groups
    rows = x.shape[-1] // groups if self.share_sets else 1
    outputs = self.features // (groups * rows)  # O/g
    tiles = partition(x, tile, rows)  # (M, h, w, C)
    # Transposing five axes, instead of all eight at once, avoids a crash: the gradient of the
    # eight-axis form crashes on CPUs in jax 0.10.2.
    grouped = tiles.reshape(*tiles.shape[:3], groups, -1)
    grouped = grouped.transpose(3, 0, 1, 2, 4)  # (g, M, h, w, C/g)
    if self.deploy:
      y = _TileDense(outputs, True, **self.dtypes(), name="dense")(grouped)
    else:
      # Statistics are kept for each set, or else for each output pixel and channel.
      norm_axis = (0,) if self.share_sets else (0, 2, 3, 4)
      y = _DenseBranch(outputs, norm_axis, **self.shared(), name="fc")(grouped, train)
    y = y.transpose(1, 2, 3, 0, 4).reshape(*tiles.shape[:3], -1)  # (M, h, w, O)
    if self.local_kernels and not self.deploy:
      y = y + self._local(groups, outputs)(tiles, train).astype(y.dtype)
    return unpartition(y.astype(self.dtype), size, rows)

  @nn.nowrap
  def _local(self, groups: int, outputs: int) -> RepConv:
    """Builds the convolutions over single tiles; for use in the compact method."""
    return RepConv(
      groups * outputs,
      branches=tuple(f"conv{size}x{size}" for size in self.local_kernels),
      groups=groups,
      **self.shared(),
      name="local",
    )

  def _check(self, x: jax.Array) -> None:
    """Raises InputError if the layer does not fit its input, or its attributes each other."""
    where = f"RepDense {'/'.join(self.path)}"
    check_tiles(where, x.shape, pair(self.tile))
    channels, features, sets = x.shape[-1], self.features, self.share_sets
    if sets is None:
      if self.groups < 1 or channels % self.groups or features % self.groups:
        raise InputError(
          f"{where}: {channels} input and {features} output channels do not both divide into "
          f"{self.groups} groups"
        )
    elif self.groups != 1 or features != channels or sets < 1 or channels % sets:
      raise InputError(
        f"{where}: with share-sets there are as many output as input channels, a multiple of the "
        f"{sets} sets, and groups stays 1; got {channels} -> {features} channels, "
        f"groups {self.groups}"
      )
    sizes = tuple(self.local_kernels)
    if len(set(sizes)) != len(sizes) or not all(size > 0 and size % 2 for size in sizes):
      raise InputError(
        f"{where}: local_kernels are different odd numbers, for example (1, 3, 5), got {sizes}. "
        "An even kernel has no centre"
      )


def recognize_rep_dense(params: Mapping[str, Any]) -> int | None:
  """Returns the number of leading axes if a scope is a RepDense in training form, else None.

  A RepDense holds `fc`, with a kernel over tiles and a norm, and perhaps `local`.
  """
  fc = params.get("fc")
  if not {"fc"} <= params.keys() <= {"fc", "local"} or not isinstance(fc, Mapping):
    return None
  if "bn" not in fc:
    return None
  return leading_axes(fc, ("dense", "kernel"), TILE_AXES)


def fold_rep_dense(
  params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> dict[str, Any]:
  """Folds a RepDense: FC and convolutions with their norms become one fully connected layer.

  kernel = FC * scale + conv_to_dense(sum of the convolutions). The biases add up likewise.

  Args:
    params: {fc: {dense: {kernel}, bn: {scale, bias}}, local: {convKxK: {conv, bn}}}; the kernel is
      (g, h, w, C/g, h, w, O/g), the vectors of its norm (g, h, w, O/g), or (g,) with share-sets.
      `local` may be missing.
    stats: {fc: {bn: {mean, var}}, local: {convKxK: {bn: {mean, var}}}}.
    epsilon: number added to the variance by batch norms.

  Returns:
    {dense: {kernel (g, h, w, C/g, h, w, O/g), bias (g, h, w, O/g)}} in the dtype of FC's kernel.

  Raises:
    ValueError: the two trees do not belong together, or shapes do not fit.

  References:
    Ding et al., RepMLP, 2021, section 3.3. https://arxiv.org/abs/2105.01883
  """
  if params.keys() != stats.keys() or not {"fc"} <= params.keys() <= {"fc", "local"}:
    raise ValueError(
      f"a RepDense has the branches fc and perhaps local; got parameters of {sorted(params)} and "
      f"statistics of {sorted(stats)}"
    )
  kernel = params["fc"]["dense"]["kernel"]
  fc_stats, fc_epsilon = read_notes(stats["fc"], epsilon)
  scale, bias = _tile_affine(params["fc"]["bn"], fc_stats.get("bn", {}), kernel, fc_epsilon)
  wide = kernel.astype(wide_dtype(kernel.dtype, scale.dtype))
  # The scale belongs to the outputs: (g, h, w, O/g) broadcasts over the input axes (h, w, C/g).
  fused = wide * scale[:, None, None, None]
  if "local" in params:
    groups, height, width = kernel.shape[:3]
    conv = merge_branches(params["local"], stats["local"], epsilon)
    if conv.kernel.shape[2:] != (kernel.shape[3], groups * kernel.shape[6]):
      raise ValueError(
        f"convolutions {conv.kernel.shape} do not lie beside a fully connected layer {kernel.shape}"
      )
    local_kernel, local_bias = conv_to_dense(conv, (height, width), groups)
    fused, bias = fused + local_kernel, bias + local_bias
  return {"dense": kernel_and_bias((fused, bias), kernel.dtype)}


def _tile_affine(
  bn: Mapping[str, jax.Array], stats: Mapping[str, jax.Array], kernel: jax.Array, epsilon: float
) -> AffineParams:
  """Returns the norm after a kernel (g, h, w, C/g, h, w, O/g) as scale and shift (g, h, w, O/g)."""
  shape = (kernel.shape[0], *kernel.shape[4:])
  flat_bn, flat_stats = jax.tree.map(jnp.ravel, (dict(bn), dict(stats)))
  affine = bn_affine(flat_bn, flat_stats, epsilon)
  if affine.scale.size not in (shape[0], math.prod(shape)):
    raise ValueError(
      f"a norm over {affine.scale.size} numbers does not follow a fully connected layer "
      f"{kernel.shape}; expected {shape[0]}, one for each set, or {math.prod(shape)}"
    )
  # A norm with one number for each set is repeated over all pixels and channels of the set.
  each = (-1, 1, 1, 1) if affine.scale.size == shape[0] else shape
  return AffineParams(*(jnp.broadcast_to(vector.reshape(each), shape) for vector in affine))


def expand_rep_dense(
  deploy: Mapping[str, Any],
  shapes: Mapping[str, Any],
  stats: Mapping[str, Any],
  epsilon: Any,
  key: jax.Array,
) -> dict[str, Any]:
  """Expands a RepDense: convolutions are drawn, and the fully connected layer takes the remainder.

  With share-sets the training form has one shift for each set, so that the bias in `deploy` must be
  the same for all pixels.

  Args:
    deploy: {dense: {kernel (g, h, w, C/g, h, w, O/g), bias (g, h, w, O/g)}}.
    shapes: shapes and dtypes of the parameters of the training form.
    stats: fresh statistics of the training form.
    epsilon: number added to the variance by batch norms.
    key: a JAX random key for the convolutions.

  Returns:
    {fc, local}, which folds into `deploy` with these statistics.
  """
  kernel, bias = deploy["dense"]["kernel"], deploy["dense"]["bias"]
  dtype = wide_dtype(kernel.dtype, bias.dtype)
  kernel, bias, params = kernel.astype(dtype), bias.astype(dtype), {}
  if "local" in shapes:
    params["local"], local = _drawn_local(kernel, shapes["local"], stats["local"], epsilon, key)
    kernel, bias = kernel - local[0].astype(dtype), bias - local[1].astype(dtype)
  norm, fc_epsilon = read_notes(stats["fc"], epsilon)
  if norm["bn"]["mean"].shape != bias.shape:  # share-sets: one number for each
    bias = bias.mean((1, 2, 3))
  bn = identity_norm(norm["bn"], fc_epsilon, shapes["fc"]["bn"], bias)
  return {"fc": {"dense": {"kernel": kernel}, "bn": bn}, **params}


def _drawn_local(
  kernel: jax.Array, shapes: Tree, stats: Tree, epsilon: Any, key: jax.Array
) -> tuple[Tree, tuple[jax.Array, jax.Array]]:
  """Draws convolutions beside a fully connected layer, and returns also what they merge into."""
  groups, tile = kernel.shape[0], (kernel.shape[1], kernel.shape[2])
  params = draw(shapes, key)

  def rows(dense: jax.Array) -> jax.Array:
    """Returns (pixels and inputs, g * O/g) of a kernel over tiles."""
    dense = dense.transpose(1, 2, 3, 4, 5, 0, 6)
    return dense.reshape(-1, groups * dense.shape[-1])

  for name, part in branch_parts(params, stats, epsilon).branches.items():
    share = share_of(rows(kernel), rows(conv_to_dense(part, tile, groups)[0]))
    params[name] = scaled_branch(params[name], share)
  return params, conv_to_dense(merge_branches(params, stats, epsilon), tile, groups)
