"""The algebra of re-parameterization: affine maps on feature maps, as pure functions on kernels.

A convolution with bias, and a batch norm at inference, are affine maps. Sums of them and chains of
them are affine again, so each can be written as one convolution. Everything is computed in float32
or wider at the highest matrix-product precision; callers cast when they are done.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class ConvParams(NamedTuple):
  """A convolution: `kernel` (H, W, I/g, O) and `bias` (O,)."""

  kernel: jax.Array
  bias: jax.Array


class AffineParams(NamedTuple):
  """A map y = x * scale + bias per channel: `scale` (C,) and `bias` (C,)."""

  scale: jax.Array
  bias: jax.Array


def wide_dtype(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
  """The dtype to compute in, given floating dtypes: float64 where one of them is, else float32.

  Unlike `jnp.promote_types` it also works under strict dtype promotion.
  """
  return jnp.dtype(jnp.float64 if any(d == jnp.float64 for d in dtypes) else jnp.float32)


def _widen(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """All arrays in their common wide dtype."""
  dtype = wide_dtype(*(array.dtype for array in arrays))
  return tuple(jnp.asarray(array, dtype) for array in arrays)


def bn_affine(
  bn: Mapping[str, jax.Array], stats: Mapping[str, jax.Array], epsilon: float
) -> AffineParams:
  """The affine map that a batch norm is once its statistics are fixed.

  scale = gamma / sqrt(var + epsilon);  bias = beta - mean * scale.

  Args:
    bn: `scale` (gamma) and `bias` (beta), both (C,).
    stats: running `mean` and `var`, both (C,).
    epsilon: added to the variance; no other function sees it.

  Returns:
    scale (C,), bias (C,), in the widest dtype of the four, at least float32.

  Raises:
    ValueError: one of the four is missing, or their shapes differ.

  References:
    Ioffe and Szegedy, Batch Normalization, ICML 2015, Algorithm 2. https://arxiv.org/abs/1502.03167
  """
  missing = [name for name in ("scale", "bias") if name not in bn]
  missing += [name for name in ("mean", "var") if name not in stats]
  if missing:
    raise ValueError(f"a batch norm needs scale, bias, mean and var; missing: {', '.join(missing)}")
  strange = sorted({*bn, *stats} - {"scale", "bias", "mean", "var"})
  if strange:
    raise ValueError(f"a batch norm has scale, bias, mean and var; it cannot hold {strange}")
  shapes = {name: jnp.shape(value) for name, value in {**bn, **stats}.items()}
  if len(set(shapes.values())) != 1 or len(shapes["scale"]) != 1:
    raise ValueError(f"the four vectors of a batch norm must have one common shape (C,): {shapes}")
  gamma, beta, mean, var = _widen(bn["scale"], bn["bias"], stats["mean"], stats["var"])
  scale = gamma * lax.rsqrt(var + epsilon)
  return AffineParams(scale, beta - mean * scale)


def fuse_bn(
  conv: ConvParams,
  bn: Mapping[str, jax.Array],
  stats: Mapping[str, jax.Array],
  epsilon: float,
) -> ConvParams:
  """Merges a convolution and the batch norm after it into one convolution.

  K' = K * scale;  b' = b * scale + bias, with scale and bias from `bn_affine`. Always exact.

  Args:
    conv: kernel (H, W, I/g, O), bias (O,).
    bn: `scale` and `bias`, both (O,).
    stats: running `mean` and `var`, both (O,).
    epsilon: the batch norm's.

  Returns:
    kernel (H, W, I/g, O), bias (O,), in the widest dtype involved, at least float32.

  Raises:
    ValueError: the batch norm's length is not O.

  References:
    Ding et al., RepVGG, CVPR 2021, section 3.3, equation 3. https://arxiv.org/abs/2101.03697
  """
  affine = bn_affine(bn, stats, epsilon)
  if affine.scale.shape != conv.kernel.shape[-1:]:
    raise ValueError(
      f"a batch norm over {affine.scale.shape[0]} channels cannot follow a convolution "
      f"with {conv.kernel.shape[-1]} outputs (kernel {conv.kernel.shape})"
    )
  kernel, bias, scale, shift = _widen(conv.kernel, conv.bias, *affine)
  return ConvParams(kernel * scale[None, None, None, :], bias * scale + shift)


def pad_kernel(
  kernel: jax.Array, size: tuple[int, int], before: tuple[int, int] | None = None
) -> jax.Array:
  """Zero-pads a kernel to a larger one that computes the same convolution.

  Exact if the larger kernel's convolution pads its input by `dilation * before` more pixels.

  Args:
    kernel: (H, W, I/g, O).
    size: the height and width wanted, in taps.
    before: taps of zeros put above and to the left; None centres the kernel.

  Returns:
    (*size, I/g, O), dtype of `kernel`.

  Raises:
    ValueError: `size` is smaller than the kernel, the kernel cannot be centred in it, or `before`
      leaves no room.

  References:
    Ding et al., RepVGG, CVPR 2021, section 3.3 and figure 4. https://arxiv.org/abs/2101.03697
  """
  old = kernel.shape[:2]
  extra = (size[0] - old[0], size[1] - old[1])
  if before is None:
    if min(extra) < 0 or extra[0] % 2 or extra[1] % 2:
      raise ValueError(
        f"a {old[0]}x{old[1]} kernel cannot be centred in {size[0]}x{size[1]}; "
        "give `before`, the taps in front of it"
      )
    before = (extra[0] // 2, extra[1] // 2)
  after = (extra[0] - before[0], extra[1] - before[1])
  if min(*before, *after) < 0:
    raise ValueError(
      f"a {old[0]}x{old[1]} kernel with {before} taps in front does not fit in {size[0]}x{size[1]}"
    )
  return jnp.pad(kernel, ((before[0], after[0]), (before[1], after[1]), (0, 0), (0, 0)))


def _diagonal(features: int, groups: int, dtype: jax.typing.DTypeLike) -> jax.Array:
  """(I/g, O) with a one where the input is output o's own channel: index o mod (C/g)."""
  if features % groups:
    raise ValueError(f"{features} channels do not divide into {groups} groups")
  width = features // groups
  own = lax.rem(lax.iota(jnp.int32, features), jnp.int32(width))  # (O,)
  return (lax.iota(jnp.int32, width)[:, None] == own[None, :]).astype(dtype)


def identity_kernel(
  features: int, groups: int, size: tuple[int, int], dtype: jax.typing.DTypeLike
) -> jax.Array:
  """The kernel of the convolution that returns its input.

  K[centre, o mod (C/g), o] = 1, all else zero. Exact at stride 1 with size // 2 taps of padding.

  Args:
    features: channels C, in and out.
    groups: g of the grouped convolution.
    size: height and width in taps, both odd.
    dtype: of the result.

  Returns:
    (*size, C/g, C).

  Raises:
    ValueError: an even size, which has no centre, or C not divisible by g.

  References:
    Ding et al., RepVGG, CVPR 2021, section 3.3. https://arxiv.org/abs/2101.03697
  """
  if not (size[0] % 2 and size[1] % 2):
    raise ValueError(f"an identity kernel needs odd sizes, got {size[0]}x{size[1]}")
  return pad_kernel(_diagonal(features, groups, dtype)[None, None], size)


def average_pool_kernel(
  features: int, groups: int, size: tuple[int, int], dtype: jax.typing.DTypeLike
) -> jax.Array:
  """The kernel of an average pool: 1 / (h * w) at every tap of a channel's own input.

  Exact for a pool that counts its zero padding.

  Args:
    features: channels C, in and out.
    groups: g of the grouped convolution.
    size: height h and width w of the pool.
    dtype: of the result.

  Returns:
    (*size, C/g, C).

  Raises:
    ValueError: C is not divisible by g.

  References:
    Ding et al., Diverse Branch Block, CVPR 2021, Transform V. https://arxiv.org/abs/2103.13425
  """
  diagonal = _diagonal(features, groups, dtype) / (size[0] * size[1])
  return jnp.broadcast_to(diagonal[None, None], (*size, *diagonal.shape))


def add(*convs: ConvParams) -> ConvParams:
  """Merges parallel convolutions whose outputs are summed: kernels and biases add up.

  Exact where all have one stride, dilation, padding and group count.

  Args:
    *convs: one or more, all with kernels (H, W, I/g, O) and biases (O,) of the same shapes.

  Returns:
    kernel (H, W, I/g, O), bias (O,), in the widest dtype involved, at least float32.

  Raises:
    ValueError: no convolution, or shapes that differ (pad smaller kernels with `pad_kernel`).

  References:
    Ding et al., Diverse Branch Block, CVPR 2021, Transform II. https://arxiv.org/abs/2103.13425
  """
  shapes = {(conv.kernel.shape, conv.bias.shape) for conv in convs}
  if len(shapes) != 1:
    raise ValueError(
      f"only convolutions of one shape can be added, got {len(convs)} with kernels "
      f"{[conv.kernel.shape for conv in convs]} and biases {[conv.bias.shape for conv in convs]}"
    )
  kernels = _widen(*(conv.kernel for conv in convs))
  biases = _widen(*(conv.bias for conv in convs))
  return ConvParams(sum(kernels[1:], kernels[0]), sum(biases[1:], biases[0]))


def compose(first: ConvParams, second: ConvParams) -> ConvParams:
  """Merges a 1x1 convolution and the KxK convolution that follows it into one KxK.

  K[h,w,i,o] = sum_m K1[i,m] K2[h,w,m,o];  b[o] = b2[o] + sum_{h,w,m} K2[h,w,m,o] b1[m].
  Exact where the KxK's border is padded with b1 rather than zero.

  Args:
    first: kernel (1, 1, I/g, M), bias (M,).
    second: kernel (H, W, M/g, O), bias (O,). Both have one group count g, read off the shapes.

  Returns:
    kernel (H, W, I/g, O), bias (O,), in the widest dtype involved, at least float32.

  Raises:
    ValueError: `first` is not 1x1, or the channels between the two do not match.

  References:
    Ding et al., Diverse Branch Block, CVPR 2021, Transform III. https://arxiv.org/abs/2103.13425
  """
  if first.kernel.shape[:2] != (1, 1):
    raise ValueError(f"the first of two composed kernels must be 1x1, got {first.kernel.shape}")
  middle, outputs = first.kernel.shape[-1], second.kernel.shape[-1]
  width = second.kernel.shape[2]  # M/g
  if not width or middle % width or outputs % (middle // width):
    raise ValueError(
      f"kernels {first.kernel.shape} and {second.kernel.shape} do not follow one another: the "
      f"second reads {width} channels a group, which must divide the first's {middle} outputs"
    )
  groups = middle // width
  k1, b1, k2, b2 = _widen(*first, *second)
  k1 = k1[0, 0].reshape(-1, groups, width)  # (I/g, g, M/g)
  k2 = k2.reshape(*k2.shape[:3], groups, outputs // groups)  # (H, W, M/g, g, O/g)
  b1 = b1.reshape(groups, width)
  kernel = jnp.einsum("igm,hwmgo->hwigo", k1, k2, precision=lax.Precision.HIGHEST)
  shift = jnp.einsum("gm,hwmgo->go", b1, k2, precision=lax.Precision.HIGHEST)
  return ConvParams(kernel.reshape(*kernel.shape[:3], outputs), b2 + shift.reshape(outputs))


def absorb_affine(
  affine: AffineParams, kernel: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Merges a per-channel affine map and the fully connected layer that reads its result.

  W'[cn + i, o] = scale[c] W[cn + i, o];  b'[o] = b[o] + sum_{c,i} shift[c] W[cn + i, o],
  where each of C channels has n inputs, one after the other. Always exact; with a mean over pixels
  in between, n = 1.

  Args:
    affine: scale (C,), bias (C,), the shift.
    kernel: (C * n, O); n is read off the shapes.
    bias: (O,).

  Returns:
    kernel (C * n, O), bias (O,), in the widest dtype involved, at least float32.

  Raises:
    ValueError: the layer's inputs are no multiple of C.

  References:
    Ding et al., RepMLP, 2021, section 3.2, for the norm before FC1. https://arxiv.org/abs/2105.01883
  """
  inputs, channels = kernel.shape[0], affine.scale.shape[0]
  if inputs % channels:
    raise ValueError(
      f"an affine map of {channels} channels cannot precede a fully connected layer with {inputs} "
      "inputs, which are no multiple of that"
    )
  scale, shift, kernel, bias = _widen(*affine, kernel, bias)
  scale, shift = (jnp.repeat(vector, inputs // channels) for vector in (scale, shift))
  moved = jnp.einsum("i,io->o", shift, kernel, precision=lax.Precision.HIGHEST)
  return kernel * scale[:, None], bias + moved


def conv_to_dense(
  conv: ConvParams, tile: tuple[int, int], groups: int = 1
) -> tuple[jax.Array, jax.Array]:
  """Writes a convolution over one h x w tile as a fully connected layer.

  M[g, y, x, c, v, u, o] = K[y - v + H // 2, x - u + W // 2, c, g, o], zero outside the kernel.
  Exact for a convolution at stride 1 whose zero padding, (H // 2, W // 2), keeps the tile's size.
  C and O may differ, the kernel may be larger than the tile, and no arithmetic rounds anything.

  Args:
    conv: kernel (H, W, C/g, O) with odd H and W, bias (O,).
    tile: height h and width w in pixels.
    groups: g; a kernel's shape does not tell it.

  Returns:
    kernel (g, h, w, C/g, h, w, O/g): group, input pixel and channel, output pixel and channel;
    bias (g, h, w, O/g). Dtypes of `conv`.

  Raises:
    ValueError: an even kernel size, or O not divisible by g.

  References:
    Ding et al., RepMLP, 2021, section 3.3. https://arxiv.org/abs/2105.01883
  """
  height, width, inputs, outputs = conv.kernel.shape
  if not (height % 2 and width % 2) or outputs % groups:
    raise ValueError(
      f"only a kernel of odd size with outputs in {groups} equal groups becomes a fully connected "
      f"layer over a tile, got {conv.kernel.shape}"
    )

  def taps(pixels: int, size: int) -> tuple[jax.Array, jax.Array]:
    """For each (input, output) pixel pair along an axis: the tap between them, and if it exists."""
    pixel = jnp.arange(pixels)
    tap = pixel[:, None] - pixel[None, :] + size // 2
    return jnp.clip(tap, 0, size - 1), (tap >= 0) & (tap < size)

  (rows, row_exists), (columns, column_exists) = taps(tile[0], height), taps(tile[1], width)
  kernel = conv.kernel[rows[:, :, None, None], columns[None, None]]  # (h, h, w, w, C/g, O)
  exists = row_exists[:, :, None, None] & column_exists[None, None]
  kernel = jnp.where(exists[..., None, None], kernel, jnp.zeros((), kernel.dtype))
  kernel = kernel.reshape(*kernel.shape[:4], inputs, groups, outputs // groups)
  kernel = kernel.transpose(5, 0, 2, 4, 1, 3, 6)  # (g, h, w, C/g, h, w, O/g)
  bias = conv.bias.reshape(groups, 1, 1, -1)
  return kernel, jnp.broadcast_to(bias, (groups, *tile, outputs // groups))
