"""RepMixer: a token mixer of FastViT, and its fold into one depthwise convolution."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from repjax.algebra import bn_affine, identity_kernel, wide_dtype
from repjax.layers.base import (
  RepLayer,
  holds_arrays,
  kernel_and_bias,
  read_notes,
  refuse_training,
)
from repjax.layers.branches import merge_branches
from repjax.layers.convolution import depthwise
from repjax.layers.layer_scale import LayerScale, holds_layer_scale, ones_like_scale, scale_outputs
from repjax.layers.remainder import expand_rep_conv, identity_norm
from repjax.layers.rep_conv import RepConv, kernel_dtype, recognize_rep_conv

_SCOPES = {"mixer", "bn", "layer_scale"}


class RepMixer(RepLayer):
  """A depthwise mixer whose shortcut is inside of it; the deploy form is one convolution with bias.

  y = x + gamma (M(x) - BN(x)). M is a RepConv with one group for each channel and the branches
  convKxK, conv1x1 and identity. Its deploy form has a kernel K and a bias b. The norm has a scale s
  and a shift t. The deploy form of the whole layer has

    K' = I + gamma (K - s I),  b' = gamma (b - t).

  Scopes of the training form: `mixer`, `bn` and `layer_scale`. Deploy form: `conv`.

  Attributes:
    size: height and width K of the kernel in taps, an odd number.

  References:
    Vasu et al., FastViT, ICCV 2023, section 3.2. https://arxiv.org/abs/2303.14189
  """

  size: int = 3

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, H, W, C) to the same shape.

    Raises:
      InputError: the size is no odd number.
      ValueError: `train` in deploy form.
    """
    refuse_training(self.deploy, train)
    features = x.shape[-1]
    conv = depthwise(features, self.size, **self.dtypes())
    if self.deploy:
      return conv(name="conv")(x)
    branches = (f"conv{self.size}x{self.size}", "conv1x1", "identity")
    mixer = RepConv(features, branches, groups=features, **self.shared(), name="mixer")
    wide = wide_dtype(x.dtype)
    mixed = mixer(x, train).astype(wide) - self.norm(x, train)
    y = x.astype(wide) + LayerScale(self.param_dtype, name="layer_scale")(mixed)
    return y.astype(self.dtype)


def recognize_rep_mixer(params: Mapping[str, Any]) -> int | None:
  """Returns the number of leading axes if a scope is a RepMixer in training form, else None.

  A RepMixer holds the RepConv `mixer`, the norm `bn`, and `layer_scale` with `gamma`.
  """
  if params.keys() != _SCOPES or not holds_arrays(params["bn"]):
    return None
  if not holds_layer_scale(params["layer_scale"]) or not isinstance(params["mixer"], Mapping):
    return None
  return recognize_rep_conv(params["mixer"])


def fold_rep_mixer(
  params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> dict[str, Any]:
  """Folds a RepMixer: mixer, norm, factors and shortcut become one depthwise convolution.

  Args:
    params: {mixer: as of a RepConv, bn: {scale, bias}, layer_scale: {gamma (C,)}}.
    stats: {mixer: as of a RepConv, bn: {mean, var}}.
    epsilon: number added to the variance by batch norms.

  Returns:
    {conv: {kernel (K, K, 1, C), bias (C,)}} in the dtype of the mixer's kernels.

  Raises:
    ValueError: the two trees do not belong together.
  """
  stats, own_epsilon = read_notes(stats, epsilon)
  if params.keys() != _SCOPES or stats.keys() != _SCOPES - {"layer_scale"}:
    raise ValueError(
      f"a RepMixer holds {', '.join(sorted(_SCOPES))}; got parameters of {sorted(params)} and "
      f"statistics of {sorted(stats)}"
    )
  conv = merge_branches(params["mixer"], stats["mixer"], epsilon)
  affine = bn_affine(params["bn"], stats["bn"], own_epsilon)
  features, size = conv.kernel.shape[-1], (conv.kernel.shape[0], conv.kernel.shape[1])
  dtype = wide_dtype(conv.kernel.dtype, affine.scale.dtype)
  identity = identity_kernel(features, features, size, dtype)
  mixed = conv.kernel.astype(dtype) - identity * affine.scale[None, None, None]
  kernel, bias = scale_outputs(params["layer_scale"]["gamma"], mixed, conv.bias - affine.bias)
  whole = identity.astype(kernel.dtype) + kernel, bias
  return {"conv": kernel_and_bias(whole, kernel_dtype(params["mixer"]))}


def expand_rep_mixer(
  deploy: Mapping[str, Any],
  shapes: Mapping[str, Any],
  stats: Mapping[str, Any],
  epsilon: Any,
  key: jax.Array,
) -> dict[str, Any]:
  """Expands a RepMixer: the mixer is the whole, factors are 1, and the norm cancels the shortcut.

  Args:
    deploy: {conv: {kernel (K, K, 1, C), bias (C,)}}.
    shapes: shapes and dtypes of the parameters of the training form.
    stats: fresh statistics of the training form.
    epsilon: number added to the variance by batch norms.
    key: a JAX random key for the small branches of the mixer.

  Returns:
    {mixer, bn, layer_scale}, which folds into `deploy` with these statistics.
  """
  stats, own_epsilon = read_notes(stats, epsilon)
  return {
    "mixer": expand_rep_conv(deploy, shapes["mixer"], stats["mixer"], epsilon, key),
    "bn": identity_norm(stats["bn"], own_epsilon, shapes["bn"]),
    "layer_scale": ones_like_scale(shapes["layer_scale"]),
  }
