"""The algebra of re-parameterization: affine maps on feature maps, as pure functions on kernels.

A convolution with bias is an affine map, and so is a batch norm at inference. Sums and chains of
affine maps are affine again, so that each can be written as one convolution. All functions compute
in float32 or wider, at the highest matrix-product precision. Callers cast the results.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
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
  """Returns the dtype to compute in: float64 if one of the dtypes is float64, else float32.

  Unlike `jnp.promote_types`, this function also works under strict dtype promotion.
  """
  return jnp.dtype(jnp.float64 if any(d == jnp.float64 for d in dtypes) else jnp.float32)


def _widen(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Casts all arrays to their common wide dtype."""
  dtype = wide_dtype(*(array.dtype for array in arrays))
  return tuple(jnp.asarray(array, dtype) for array in arrays)


def bn_affine(
  bn: Mapping[str, jax.Array], stats: Mapping[str, jax.Array], epsilon: float
) -> AffineParams:
  """Returns the affine map that a batch norm computes at inference.

  scale = gamma / sqrt(var + epsilon);  bias = beta - mean * scale.

  Args:
    bn: `scale` (gamma) and `bias` (beta), both (C,).
    stats: running `mean` and `var`, both (C,).
    epsilon: number added to the variance. All functions that take epsilon pass it on to this one.

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
    raise ValueError(
      f"the four vectors of a batch norm must have one common shape (C,), got {shapes}. Scale and "
      "bias come from params, mean and var from batch_stats; pass both of one model"
    )
  # The four are widened before any arithmetic: mean * scale and beta may nearly cancel.
  gamma, beta, mean, var = _widen(bn["scale"], bn["bias"], stats["mean"], stats["var"])
  scale = gamma * lax.rsqrt(var + epsilon)
  return AffineParams(scale, beta - mean * scale)


def affine_bn(
  affine: AffineParams, stats: Mapping[str, jax.Array], epsilon: float | jax.Array
) -> dict[str, jax.Array]:
  """Returns the scale and bias with which a batch norm computes an affine map: undoes `bn_affine`.

  gamma = scale * sqrt(var + epsilon);  beta = bias + mean * scale.

  Args:
    affine: scale and bias, in the shape of the statistics.
    stats: running `mean` and `var`, of any shape.
    epsilon: number added to the variance by the batch norm.

  Returns:
    {scale, bias}, in the widest dtype of the four, at least float32.
  """
  scale, bias, mean, var = _widen(*affine, stats["mean"], stats["var"])
  return {"scale": scale * jnp.sqrt(var + epsilon), "bias": bias + mean * scale}


def rebase_bn(
  bn: Mapping[str, jax.Array],
  old: Mapping[str, jax.Array],
  new: Mapping[str, jax.Array],
  epsilon: float | jax.Array,
) -> dict[str, jax.Array]:
  """Returns the scale and bias with which a batch norm of new statistics computes the same.

  gamma' = s * sqrt(var' + epsilon);  beta' = beta + (mean' - mean) * s, with the old scale
  s = gamma / sqrt(var + epsilon).

  Args:
    bn: `scale` (gamma) and `bias` (beta), of any shape.
    old: `mean` and `var` that belong to them.
    new: `mean` and `var` to which the result belongs.
    epsilon: number added to the variance by the batch norm.

  Returns:
    {scale, bias}, in the widest dtype involved, at least float32.
  """
  gamma, beta, mean, var = _widen(bn["scale"], bn["bias"], old["mean"], old["var"])
  scale = gamma * lax.rsqrt(var + epsilon)
  return affine_bn(AffineParams(scale, beta - mean * scale), new, epsilon)


def _check_outputs(kernel: jax.Array, **vectors: jax.Array) -> None:
  """Raises ValueError unless vectors have one number for each output of a kernel."""
  # Broadcasting would repeat a vector of one number without a word.
  for name, vector in vectors.items():
    if vector.shape != kernel.shape[-1:]:
      raise ValueError(
        f"{name} of shape {vector.shape} does not have one number for each of the "
        f"{kernel.shape[-1]} outputs of a kernel {kernel.shape}"
      )


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
    epsilon: number added to the variance by the batch norm.

  Returns:
    kernel (H, W, I/g, O), bias (O,), in the widest dtype involved, at least float32.

  Raises:
    ValueError: the bias or the vectors of the batch norm do not have length O.

  References:
    Ding et al., RepVGG, CVPR 2021, section 3.3, equation 3. https://arxiv.org/abs/2101.03697
  """
  affine = bn_affine(bn, stats, epsilon)
  if affine.scale.shape != conv.kernel.shape[-1:]:
    raise ValueError(
      f"a batch norm over {affine.scale.shape[0]} channels cannot follow a convolution "
      f"with {conv.kernel.shape[-1]} outputs (kernel {conv.kernel.shape})"
    )
  _check_outputs(conv.kernel, bias=conv.bias)
  kernel, bias, scale, shift = _widen(conv.kernel, conv.bias, *affine)
  return ConvParams(kernel * scale[None, None, None, :], bias * scale + shift)


def pad_kernel(
  kernel: jax.Array, size: tuple[int, int], before: tuple[int, int] | None = None
) -> jax.Array:
  """Zero-pads a kernel to a larger kernel that computes the same convolution.

  Exact if the convolution with the larger kernel pads its input by `dilation * before` more pixels.

  Args:
    kernel: (H, W, I/g, O).
    size: height and width of the result in taps.
    before: number of zero taps added above and to the left. None centres the kernel.

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
        "give `before`, the number of taps added above and to the left"
      )
    before = (extra[0] // 2, extra[1] // 2)
  after = (extra[0] - before[0], extra[1] - before[1])
  if min(*before, *after) < 0:
    raise ValueError(
      f"a {old[0]}x{old[1]} kernel with {before} taps in front does not fit in {size[0]}x{size[1]}"
    )
  return jnp.pad(kernel, ((before[0], after[0]), (before[1], after[1]), (0, 0), (0, 0)))


def dilate_kernel(kernel: jax.Array, rate: int | tuple[int, ...]) -> jax.Array:
  """Writes a dilated convolution as a larger convolution without dilation.

  K'[r h, r w, i, o] = K[h, w, i, o], all else zero. Always exact.

  Args:
    kernel: (taps..., I/g, O), with any number of axes of taps, such as (H, W, I/g, O).
    rate: distance r from tap to tap, at least 1; one number, or one for each axis of taps.

  Returns:
    ((T - 1) r + 1 taps..., I/g, O), dtype of `kernel`.

  Raises:
    ValueError: a rate is below 1.

  References:
    Ding et al., UniRepLKNet, CVPR 2024, section 3.1. https://arxiv.org/abs/2311.15599
  """
  rates = rate if isinstance(rate, tuple) else (rate,) * (kernel.ndim - 2)
  if min(rates, default=1) < 1:
    raise ValueError(f"the distance from tap to tap is at least 1, got {rate}")
  between = [*((0, 0, each - 1) for each in rates), (0, 0, 0), (0, 0, 0)]
  return lax.pad(kernel, jnp.zeros((), kernel.dtype), between)


def _diagonal(features: int, groups: int, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Returns (C/g, C) with a one where input and output are the same channel: i = o mod (C/g)."""
  if features % groups:
    raise ValueError(f"{features} channels do not divide into {groups} groups")
  width = features // groups
  # Grouped kernels number the inputs of each group from 0, so channel o reads input o mod (C/g).
  own = lax.rem(lax.iota(jnp.int32, features), jnp.int32(width))  # (O,)
  return (lax.iota(jnp.int32, width)[:, None] == own[None, :]).astype(dtype)


def identity_kernel(
  features: int, groups: int, size: tuple[int, int], dtype: jax.typing.DTypeLike
) -> jax.Array:
  """Returns the kernel of the convolution that returns its input.

  K[centre, o mod (C/g), o] = 1, all else zero. Exact at stride 1 with size // 2 taps of padding.

  Args:
    features: number of channels C, in and out.
    groups: number of groups g of the convolution.
    size: height and width in taps, both odd.
    dtype: dtype of the result.

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


def dirac_kernel(kernel: jax.Array, diagonal: jax.Array, gain: jax.Array) -> jax.Array:
  """Returns the kernel of DiracNet: an identity, and a normalised kernel, each with a scale.

  K'[h,w,i,o] = a[o] D[h,w,i,o] + c[o] K[h,w,i,o] / |K[..., o]|, with D one at the centre from
  channel o to itself, else zero. |.| is the square root of the sum of squares of one output.

  Args:
    kernel: (H, W, I, O) of one group, with odd H and W.
    diagonal: a, (O,).
    gain: c, (O,).

  Returns:
    (H, W, I, O), in the widest dtype involved, at least float32.

  Raises:
    ValueError: an even size, which has no centre, or vectors that do not have length O.

  References:
    Zagoruyko and Komodakis, DiracNets, 2017, section 3. https://arxiv.org/abs/1706.00388
  """
  height, width, inputs, outputs = kernel.shape
  if not (height % 2 and width % 2):
    raise ValueError(f"a kernel with an identity needs odd sizes, got {height}x{width}")
  _check_outputs(kernel, diagonal=diagonal, gain=gain)
  kernel, diagonal, gain = _widen(kernel, diagonal, gain)
  identity = pad_kernel(jnp.eye(inputs, outputs, dtype=kernel.dtype)[None, None], (height, width))
  # A filter of zeros stays zero; 1e-12 is the least norm that the authors divide by.
  norms = jnp.sqrt(lax.max(jnp.square(kernel).sum((0, 1, 2)), jnp.asarray(1e-24, kernel.dtype)))
  scale = gain / norms
  return identity * diagonal[None, None, None, :] + kernel * scale[None, None, None, :]


def average_pool_kernel(
  features: int, groups: int, size: tuple[int, int], dtype: jax.typing.DTypeLike
) -> jax.Array:
  """Returns the kernel of an average pool: 1 / (h * w) at every tap, from a channel to itself.

  Exact for a pool that counts its zero padding.

  Args:
    features: number of channels C, in and out.
    groups: number of groups g of the convolution.
    size: height h and width w of the pool.
    dtype: dtype of the result.

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

  Exact if all have the same stride, dilation, padding and number of groups.

  Args:
    *convs: one or more convolutions; all have kernels (H, W, I/g, O) of one shape and biases (O,).

  Returns:
    kernel (H, W, I/g, O), bias (O,), in the widest dtype involved, at least float32.

  Raises:
    ValueError: there is no convolution, or shapes differ. `pad_kernel` enlarges smaller kernels.

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
  """Merges a 1x1 convolution and the KxK convolution after it into one KxK convolution.

  K[h,w,i,o] = sum_m K1[i,m] K2[h,w,m,o];  b[o] = b2[o] + sum_{h,w,m} K2[h,w,m,o] b1[m].
  Exact if the KxK convolution pads its border with b1. Zero padding would differ at the border.

  Args:
    first: kernel (1, 1, I/g, M), bias (M,).
    second: kernel (H, W, M/g, O), bias (O,). Both have the same number of groups g, which follows
      from the shapes.

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
  # Outputs of a grouped convolution lie group by group. With an axis for the groups, the sums over
  # the M/g middle channels stay within a group.
  k1 = k1[0, 0].reshape(-1, groups, width)  # (I/g, g, M/g)
  k2 = k2.reshape(*k2.shape[:3], groups, outputs // groups)  # (H, W, M/g, g, O/g)
  b1 = b1.reshape(groups, width)
  kernel = jnp.einsum("igm,hwmgo->hwigo", k1, k2, precision=lax.Precision.HIGHEST)
  shift = jnp.einsum("gm,hwmgo->go", b1, k2, precision=lax.Precision.HIGHEST)
  return ConvParams(kernel.reshape(*kernel.shape[:3], outputs), b2 + shift.reshape(outputs))


class BranchScales(NamedTuple):
  """The scales of y = s3 * conv3x3(x) + s1 * conv1x1(x) + s0 * x, each (O,).

  Attributes:
    conv3x3: s3, on the output of the 3x3 convolution.
    conv1x1: s1, on the output of the 1x1 convolution.
    identity: s0, on the input; None where there is no identity.
  """

  conv3x3: jax.Array
  conv1x1: jax.Array
  identity: jax.Array | None


def scale_branches(conv3x3: jax.Array, conv1x1: jax.Array, scales: BranchScales) -> jax.Array:
  """Merges a scaled 3x3 convolution, a scaled 1x1 convolution and a scaled identity into one 3x3.

  K = s3 K3 + pad(s1 K1) + s0 I, with the identity kernel I. Always exact.

  Args:
    conv3x3: K3, (3, 3, I/g, O).
    conv1x1: K1, (1, 1, I/g, O).
    scales: the scales s3, s1 and s0.

  Returns:
    (3, 3, I/g, O), in the widest dtype involved, at least float32.

  Raises:
    ValueError: the kernels do not lie beside each other, or scales do not have length O.

  References:
    Ding et al., Re-parameterizing Your Optimizers rather than Architectures, ICLR 2023, the rule
      of initialization. https://arxiv.org/abs/2205.15242
  """
  if conv3x3.shape[:2] != (3, 3) or conv1x1.shape != (1, 1, *conv3x3.shape[2:]):
    raise ValueError(
      f"a 3x3 and a 1x1 kernel of the same channels can be added, got {conv3x3.shape} and "
      f"{conv1x1.shape}"
    )
  _check_outputs(conv3x3, **{name: s for name, s in scales._asdict().items() if s is not None})
  k3, k1, s3, s1 = _widen(conv3x3, conv1x1, scales.conv3x3, scales.conv1x1)
  kernel = k3 * _over_outputs(s3) + pad_kernel(k1 * _over_outputs(s1), (3, 3))
  if scales.identity is None:
    return kernel
  kernel, s0 = _widen(kernel, scales.identity)
  return kernel + _identity_beside(kernel.shape, kernel.dtype) * _over_outputs(s0)


def gradient_multiplier(
  shape: tuple[int, int, int, int], scales: BranchScales, power: int
) -> jax.Array:
  """Returns the factors by which a plain kernel learns as the kernel that `scale_branches` returns.

  M = |s3|^power + pad(|s1|^power) + I, with the identity kernel I where there is an identity.

  By the chain rule, the gradients of K3, K1 and s0 are s3 G, s1 G and G at their taps, where G is
  the gradient of K. In K, they count s3, s1 and 1 times. One step of SGD on the three thus moves K
  by (s3^2 + ...) G, so the power is 2. Adam divides by the size of a gradient, which leaves 1.

  Args:
    shape: (3, 3, I/g, O), shape of K.
    scales: s3 and s1 are constants. s0 learns, so its value does not matter.
    power: 2 for SGD, 1 for Adam.

  Returns:
    M (3, 3, I/g, O), in the dtype of the scales, at least float32.

  References:
    Ding et al., Re-parameterizing Your Optimizers rather than Architectures, ICLR 2023, the rule
      of iteration. https://arxiv.org/abs/2205.15242
  """
  s3, s1 = (jnp.abs(s) ** power for s in _widen(scales.conv3x3, scales.conv1x1))
  centre = pad_kernel(jnp.broadcast_to(_over_outputs(s1), (1, 1, *shape[2:])), (3, 3))
  multiplier = _over_outputs(s3) + centre
  if scales.identity is None:
    return multiplier
  return multiplier + _identity_beside(shape, multiplier.dtype)


def _over_outputs(scale: jax.Array) -> jax.Array:
  """Returns a vector (O,) as (1, 1, 1, O), to multiply kernels."""
  return scale[None, None, None, :]


def _identity_beside(shape: Sequence[int], dtype: jax.typing.DTypeLike) -> jax.Array:
  """Returns the identity kernel of a shape (H, W, I/g, O), whose I and O must be the same."""
  return identity_kernel(shape[3], shape[3] // shape[2], (shape[0], shape[1]), dtype)


def absorb_affine(
  affine: AffineParams, kernel: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Merges a per-channel affine map and the fully connected layer after it.

  W'[cn + i, o] = scale[c] W[cn + i, o];  b'[o] = b[o] + sum_{c,i} shift[c] W[cn + i, o].

  Each of C channels has n inputs, one after the other. Always exact. With a mean over pixels
  between the two, n = 1.

  Args:
    affine: scale (C,), and the shift as bias (C,).
    kernel: (C * n, O); n follows from the shapes.
    bias: (O,).

  Returns:
    kernel (C * n, O), bias (O,), in the widest dtype involved, at least float32.

  Raises:
    ValueError: the layer's inputs are no multiple of C, or the bias does not have length O.

  References:
    Ding et al., RepMLP, 2021, section 3.2, for the norm before FC1. https://arxiv.org/abs/2105.01883
  """
  inputs, channels = kernel.shape[0], affine.scale.shape[0]
  if inputs % channels:
    raise ValueError(
      f"an affine map of {channels} channels cannot precede a fully connected layer with {inputs} "
      f"inputs, because {inputs} is no multiple of {channels}"
    )
  _check_outputs(kernel, bias=bias)
  scale, shift, kernel, bias = _widen(*affine, kernel, bias)
  scale, shift = (jnp.repeat(vector, inputs // channels) for vector in (scale, shift))
  moved = jnp.einsum("i,io->o", shift, kernel, precision=lax.Precision.HIGHEST)
  return kernel * scale[:, None], bias + moved


def conv_to_dense(
  conv: ConvParams, tile: tuple[int, int], groups: int = 1
) -> tuple[jax.Array, jax.Array]:
  """Writes a convolution over one h x w tile as a fully connected layer.

  M[g, y, x, c, v, u, o] = K[y - v + H // 2, x - u + W // 2, c, g, o], zero outside the kernel.
  (y, x) is an input pixel and c its channel in group g; (v, u) is an output pixel and o its channel
  in group g. K is the kernel with its last axis O split into (g, O/g), which makes five axes.
  Exact for a convolution at stride 1 whose zero padding, (H // 2, W // 2), keeps the tile's size.
  C and O may differ, and the kernel may be larger than the tile. Values are copied, so nothing is
  rounded.

  Args:
    conv: kernel (H, W, C/g, O) with odd H and W, bias (O,).
    tile: height h and width w in pixels.
    groups: number of groups g, which the shape of a kernel does not tell.

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
    """Returns the tap between each input and output pixel along an axis, and if the tap exists."""
    # Output pixel v reads input pixel y through tap y - v, counted from the centre of the kernel.
    pixel = jnp.arange(pixels)
    tap = pixel[:, None] - pixel[None, :] + size // 2
    # Taps outside the kernel are clipped to a valid index here, and set to zero below.
    return jnp.clip(tap, 0, size - 1), (tap >= 0) & (tap < size)

  (rows, row_exists), (columns, column_exists) = taps(tile[0], height), taps(tile[1], width)
  kernel = conv.kernel[rows[:, :, None, None], columns[None, None]]  # (h, h, w, w, C/g, O)
  exists = row_exists[:, :, None, None] & column_exists[None, None]
  kernel = jnp.where(exists[..., None, None], kernel, jnp.zeros((), kernel.dtype))
  kernel = kernel.reshape(*kernel.shape[:4], inputs, groups, outputs // groups)
  kernel = kernel.transpose(5, 0, 2, 4, 1, 3, 6)  # (g, h, w, C/g, h, w, O/g)
  bias = conv.bias.reshape(groups, 1, 1, -1)
  return kernel, jnp.broadcast_to(bias, (groups, *tile, outputs // groups))


def merge_groups(kernel: jax.Array, groups: int, fewer: int) -> jax.Array:
  """Writes a grouped convolution with fewer groups, as zeros between groups that were apart.

  With p = g / f groups in each new group, K'[.., a * I/g + i, o] = K[.., i, o] if output o is in
  the a-th of the p groups, else zero. Always exact.

  Args:
    kernel: (taps..., I/g, O), with any number of axes of taps.
    groups: number of groups g.
    fewer: number of groups f of the result, which divides g.

  Returns:
    (taps..., I/f, O), dtype of `kernel`.

  Raises:
    ValueError: `fewer` does not divide `groups`, or `groups` does not divide O.
  """
  *taps, inputs, outputs = kernel.shape
  if groups % fewer or outputs % groups:
    raise ValueError(
      f"a kernel {kernel.shape} in {groups} groups cannot be written in {fewer}: {groups} must be "
      f"a multiple of {fewer}, and divide the {outputs} outputs"
    )
  if groups == fewer:
    return kernel
  parts = groups // fewer
  kernel = kernel.reshape(*taps, 1, inputs, fewer, parts, outputs // groups)
  own = jnp.eye(parts, dtype=kernel.dtype).reshape(*(1 for _ in taps), parts, 1, 1, parts, 1)
  return (kernel * own).reshape(*taps, parts * inputs, outputs)


def chain_kernels(
  first: jax.Array,
  second: jax.Array,
  groups: int,
  first_steps: tuple[int, ...],
  second_steps: tuple[int, ...],
) -> jax.Array:
  """Merges two convolutions, one after the other, into one convolution of any size.

  K[t1 * s1 + t2 * s2, i, o] = sum_m K1[t1, i, m] K2[t2, m, o], for all taps t1 and t2. Exact if
  nothing is padded between the two, or if the padding is what the first makes of padding.

  Args:
    first: (taps..., I/g, M), with any number of axes of taps.
    second: (taps..., M/g, O), with the same number of axes of taps.
    groups: number of groups g of both.
    first_steps: distance of the first kernel's taps along each axis, in taps of the result.
    second_steps: the same for the second kernel, its dilation times the first's stride.

  Returns:
    ((T1 - 1) * s1 + (T2 - 1) * s2 + 1 taps..., I/g, O), in the widest dtype, at least float32.

  Raises:
    ValueError: the channels between the two do not match.

  References:
    Ding et al., Diverse Branch Block, CVPR 2021, Transform III. https://arxiv.org/abs/2103.13425
  """
  middle, width = first.shape[-1], second.shape[-2]
  if middle != width * groups or second.shape[-1] % groups:
    raise ValueError(
      f"kernels {first.shape} and {second.shape} in {groups} groups do not follow one another"
    )
  first, second = _widen(first, second)
  rows = first.reshape(*first.shape[:-1], groups, width)  # (taps, I/g, g, M/g)
  columns = second.reshape(*second.shape[:-1], groups, -1)  # (taps, M/g, g, O/g)
  lengths = [
    (t1 - 1) * s1 + (t2 - 1) * s2 + 1
    for t1, t2, s1, s2 in zip(first.shape, second.shape, first_steps, second_steps)
  ]
  result = jnp.zeros((*lengths, first.shape[-2], second.shape[-1]), first.dtype)
  # One sum over channels for each tap of the smaller kernel, placed on the grid of the result.
  inner = math.prod(second.shape[:-2]) <= math.prod(first.shape[:-2])
  for tap in itertools.product(*map(range, (second if inner else first).shape[:-2])):
    if inner:
      part = jnp.einsum("...igm,mgo->...igo", rows, columns[tap], precision=lax.Precision.HIGHEST)
    else:
      part = jnp.einsum("igm,...mgo->...igo", rows[tap], columns, precision=lax.Precision.HIGHEST)
    part = part.reshape(*part.shape[:-2], -1)
    fixed, steps = (second_steps, first_steps) if inner else (first_steps, second_steps)
    place = tuple(
      slice(at * step, at * step + (taps - 1) * own + 1, own)
      for at, step, taps, own in zip(tap, fixed, part.shape, steps)
    )
    result = result.at[place].add(part)
  return result
