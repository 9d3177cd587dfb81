"""ScaledConv: branches with one scale for each channel, one batch norm after their sum, and a fold.

The hyper-search of RepOptimizer trains this layer. What the scales become says how the kernels of a
plain network are to learn.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.algebra import BranchScales, ConvParams, fuse_bn, scale_branches, wide_dtype
from repjax.errors import InputError
from repjax.layers.base import RepLayer, leading_axes, read_notes, refuse_training
from repjax.layers.composition import Conv
from repjax.layers.convolution import convolution
from repjax.layers.drawing import draw
from repjax.layers.remainder import identity_norm, share_of


class _ScaledBranch(nn.Module):
  """A convolution, or nothing, and a factor for each channel after it.

  Attributes:
    conv: builds the convolution, given its name. An identity branch has None.
    first_scale: initial value of the factors.
    param_dtype: dtype of the factors.
  """

  conv: Callable[..., nn.Module] | None
  first_scale: float
  param_dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    if self.conv is not None:
      x = self.conv(name="conv")(x)
    first = nn.initializers.constant(self.first_scale)
    scale = self.param("scale", first, (x.shape[-1],), self.param_dtype)
    wide = wide_dtype(x.dtype)
    return x.astype(wide) * scale.astype(wide)[None, None, None, :]


class ScaledConv(RepLayer):
  """A batch norm of scaled branches; its deploy form is one 3x3 convolution with bias.

  y = BN(s3 * conv3x3(x) + s1 * conv1x1(x) + s0 * x). The scales have one number for each channel
  and are trained. The deploy form is exact for every stride, dilation and group count. The sum of
  the branches is computed in at least float32.

  Attributes:
    features: number of output channels O.
    identity: add the branch s0 * x, which needs stride 1 and as many output as input channels.
    strides: stride of both convolutions.
    groups: number of groups of both convolutions.
    dilation: dilation of the 3x3 convolution.
    first_scale: initial value of s3 and s1. That of s0 is 1.

  References:
    Ding et al., Re-parameterizing Your Optimizers rather than Architectures, ICLR 2023, the
      hyper-search. https://arxiv.org/abs/2205.15242
  """

  features: int
  identity: bool = True
  strides: int = 1
  groups: int = 1
  dilation: int = 1
  first_scale: float = 1.0

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, H, W, I) to (N, H / strides, W / strides, O).

    Raises:
      InputError: an identity branch beside convolutions that change the shape.
      ValueError: `train` in deploy form.
    """
    refuse_training(self.deploy, train)
    inputs = x.shape[-1]
    if self.deploy:
      return self._conv(3, inputs, use_bias=True)(name="conv")(x)
    if self.identity and (inputs, self.strides) != (self.features, 1):
      raise InputError(
        f"ScaledConv {'/'.join(self.path)}: an identity branch needs stride 1 and as many output "
        f"as input channels; got stride {self.strides} and {inputs} -> {self.features} channels. "
        "Pass identity=False"
      )

    def branch(name: str, conv: Callable[..., nn.Module] | None, first: float) -> jax.Array:
      return _ScaledBranch(conv, first, self.param_dtype, name=name)(x)

    y = branch("conv3x3", self._conv(3, inputs), self.first_scale)
    y += branch("conv1x1", self._conv(1, inputs), self.first_scale)
    if self.identity:
      y += branch("identity", None, 1.0)
    return self.norm(y, train).astype(self.dtype)

  def _conv(self, size: int, inputs: int, use_bias: bool = False) -> Callable[..., nn.Module]:
    """Returns a function that builds a convolution that keeps the map's size at stride 1."""
    pad = self.dilation * (size // 2)
    conv = Conv(
      inputs,
      self.features,
      (size, size),
      (self.strides, self.strides),
      (pad, pad),
      (self.dilation, self.dilation),
      self.groups,
      use_bias,
    )
    return convolution(conv, **self.dtypes())


def scales_of(params: Mapping[str, Any]) -> BranchScales:
  """Returns the scales in the parameters of a ScaledConv, or their shapes in a tree of shapes."""
  identity = params["identity"]["scale"] if "identity" in params else None
  return BranchScales(params["conv3x3"]["scale"], params["conv1x1"]["scale"], identity)


def merged_kernel(params: Mapping[str, Any]) -> jax.Array:
  """Returns the kernel of the one convolution that computes the sum of a ScaledConv's branches."""
  k3, k1 = (params[name]["conv"]["kernel"] for name in ("conv3x3", "conv1x1"))
  return scale_branches(k3, k1, scales_of(params))


def branch_kernels(
  params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> dict[str, jax.Array]:
  """Returns the part of each branch in the kernel of the deploy form; the sum is that kernel.

  Args:
    params: as in `fold_scaled_conv`.
    stats: as in `fold_scaled_conv`.
    epsilon: as in `fold_scaled_conv`.
  """

  def alone(name: str) -> Mapping[str, Any]:
    others = params.keys() - {name, "bn"}
    zeros = {other: jnp.zeros_like(params[other]["scale"]) for other in others}
    return {**params, **{other: {**params[other], "scale": zeros[other]} for other in others}}

  names = [name for name in params if name != "bn"]
  return {name: fold_scaled_conv(alone(name), stats, epsilon)["conv"]["kernel"] for name in names}


def recognize_scaled_conv(params: Mapping[str, Any]) -> int | None:
  """Returns the number of leading axes if a scope is a ScaledConv in training form, else None.

  A ScaledConv holds `bn`, the branches `conv3x3` and `conv1x1`, each with `conv` and `scale`, and
  perhaps `identity` with `scale` alone.
  """
  if params.keys() - {"identity"} != {"bn", "conv3x3", "conv1x1"}:
    return None
  for name, held in params.items():
    wanted = {"scale"} if name == "identity" else {"conv", "scale"}
    if name != "bn" and not (isinstance(held, Mapping) and held.keys() == wanted):
      return None
  return leading_axes(params, ("conv3x3", "conv", "kernel"), 4)


def fold_scaled_conv(
  params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> dict[str, Any]:
  """Folds a ScaledConv: scaled branches and the norm after their sum become one convolution.

  Args:
    params: {conv3x3: {conv: {kernel}, scale}, conv1x1: {conv: {kernel}, scale}, bn: {scale, bias}},
      and {identity: {scale}} if there is an identity.
    stats: {bn: {mean, var}}.
    epsilon: number added to the variance by the batch norm.

  Returns:
    {conv: {kernel (3, 3, I/g, O), bias (O,)}} in the dtype of the 3x3 kernel.

  Raises:
    ValueError: a branch or `bn` is missing, or shapes do not fit.
  """
  stats, epsilon = read_notes(stats, epsilon)
  missing = sorted({"conv3x3", "conv1x1", "bn"} - params.keys())
  strange = sorted(
    (params.keys() - {"conv3x3", "conv1x1", "identity", "bn"}) | stats.keys() - {"bn"}
  )
  if missing or strange:
    raise ValueError(
      "a ScaledConv holds conv3x3, conv1x1, perhaps identity, and bn; "
      f"missing: {', '.join(missing) or 'none'}; unexpected: {', '.join(strange) or 'none'}"
    )
  kernel = merged_kernel(params)
  zeros = jnp.zeros(kernel.shape[-1:], kernel.dtype)
  kernel, bias = fuse_bn(ConvParams(kernel, zeros), params["bn"], stats.get("bn", {}), epsilon)
  dtype = params["conv3x3"]["conv"]["kernel"].dtype
  return {"conv": {"kernel": kernel.astype(dtype), "bias": bias.astype(dtype)}}


def expand_scaled_conv(
  deploy: Mapping[str, Any],
  shapes: Mapping[str, Any],
  stats: Mapping[str, Any],
  epsilon: Any,
  key: jax.Array,
) -> dict[str, Any]:
  """Expands a ScaledConv: small branches are drawn and scaled, and the 3x3 takes the remainder.

  The norm changes nothing but adds the bias, and the scale of the 3x3 is 1.

  Args:
    deploy: {conv: {kernel (3, 3, I/g, O), bias (O,)}}.
    shapes: shapes and dtypes of the parameters of the training form.
    stats: fresh statistics of the training form.
    epsilon: number added to the variance by the batch norm.
    key: a JAX random key for the small branches.

  Returns:
    Parameters of the training form that fold into `deploy` with these statistics.
  """
  kernel, bias = deploy["conv"]["kernel"], deploy["conv"]["bias"]
  norm, own_epsilon = read_notes(stats, epsilon)
  params = draw({name: held for name, held in shapes.items() if name != "conv3x3"}, key)
  params["bn"] = identity_norm(norm["bn"], own_epsilon, shapes["bn"], bias)
  largest = shapes["conv3x3"]["conv"]["kernel"]
  ones = jnp.ones(shapes["conv3x3"]["scale"].shape, shapes["conv3x3"]["scale"].dtype)
  params["conv3x3"] = {"conv": {"kernel": jnp.zeros(largest.shape, largest.dtype)}, "scale": ones}
  for name, part in branch_kernels(params, stats, epsilon).items():
    if name != "conv3x3":
      scale = params[name]["scale"]
      params[name]["scale"] = scale * share_of(kernel, part).astype(scale.dtype)
  rest = fold_scaled_conv(params, stats, epsilon)["conv"]["kernel"]
  remainder = kernel.astype(rest.dtype) - rest
  params["conv3x3"] = {"conv": {"kernel": remainder}, "scale": ones}
  return params
