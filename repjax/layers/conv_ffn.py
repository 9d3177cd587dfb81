"""ConvFFN: a depthwise convolution, two fully connected layers over channels, and factors."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from repjax.layers.base import (
  RepLayer,
  kernel_and_bias,
  leading_axes,
  read_notes,
  refuse_training,
)
from repjax.layers.convolution import depthwise
from repjax.layers.layer_scale import LayerScale, holds_layer_scale, ones_like_scale, scale_outputs
from repjax.layers.linear import TwoLayers
from repjax.layers.remainder import expand_rep_conv
from repjax.layers.rep_conv import RepConv, fold_rep_conv, recognize_rep_conv

_SCOPES = {"spatial", "dense", "layer_scale"}


class ConvFFN(RepLayer):
  """A depthwise conv-BN, a fully connected layer, an activation, a second one, and factors.

  y = gamma fc2(act(fc1(BN(conv(x))))). The norm folds into the convolution, and the factors fold
  into fc2. The deploy form keeps the depthwise convolution and fc1 apart: as one convolution they
  would have as many times more multiplications as the kernel has taps.

  Scopes of the training form: `spatial`, a RepConv of one branch, `dense` with `fc1` and `fc2`, and
  `layer_scale`. Deploy form: `conv`, and `dense` with `fc1` and `fc2`.

  Attributes:
    expansion: ratio of the hidden layer's width to the input's.
    size: height and width of the convolution in taps, an odd number.
    act: name of the activation: "relu", "silu" or "gelu".

  References:
    Vasu et al., FastViT, ICCV 2023, section 3.2. https://arxiv.org/abs/2303.14189
  """

  expansion: int = 4
  size: int = 7
  act: str = "gelu"

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
      x = conv(name="conv")(x)
    else:
      branches = (f"conv{self.size}x{self.size}",)
      x = RepConv(features, branches, groups=features, **self.shared(), name="spatial")(x, train)
    hidden = self.expansion * features
    x = TwoLayers(hidden, ("fc1", "fc2"), self.act, **self.dtypes(), name="dense")(x)
    return x if self.deploy else LayerScale(self.param_dtype, name="layer_scale")(x)


def recognize_conv_ffn(params: Mapping[str, Any]) -> int | None:
  """Returns the number of leading axes if a scope is a ConvFFN in training form, else None.

  A ConvFFN holds the RepConv `spatial`, `dense` with `fc1` and `fc2`, and `layer_scale`.
  """
  if params.keys() != _SCOPES or not all(isinstance(held, Mapping) for held in params.values()):
    return None
  dense = params["dense"]
  if not holds_layer_scale(params["layer_scale"]) or dense.keys() != {"fc1", "fc2"}:
    return None
  if recognize_rep_conv(params["spatial"]) is None:
    return None
  return leading_axes(dense, ("fc1", "kernel"), 2)


def fold_conv_ffn(
  params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> dict[str, Any]:
  """Folds a ConvFFN: the norm goes into the convolution, and the factors go into fc2.

  Args:
    params: {spatial: as of a RepConv, dense: {fc1: {kernel (C, M), bias (M,)}, fc2: {kernel (M, C),
      bias (C,)}}, layer_scale: {gamma (C,)}}.
    stats: {spatial: as of a RepConv}.
    epsilon: number added to the variance by the batch norm.

  Returns:
    {conv: {kernel (K, K, 1, C), bias (C,)}, dense: {fc1, fc2}} in the dtypes of the kernels.

  Raises:
    ValueError: the two trees do not belong together.
  """
  stats, _ = read_notes(stats, epsilon)
  if params.keys() != _SCOPES or stats.keys() != {"spatial"}:
    raise ValueError(
      f"a ConvFFN holds {', '.join(sorted(_SCOPES))}, with statistics of spatial; got parameters "
      f"of {sorted(params)} and statistics of {sorted(stats)}"
    )
  fc1, fc2 = (params["dense"][name] for name in ("fc1", "fc2"))
  folded = scale_outputs(params["layer_scale"]["gamma"], fc2["kernel"], fc2["bias"])
  return {
    **fold_rep_conv(params["spatial"], stats["spatial"], epsilon),
    "dense": {"fc1": fc1, "fc2": kernel_and_bias(folded, fc2["kernel"].dtype)},
  }


def expand_conv_ffn(
  deploy: Mapping[str, Any],
  shapes: Mapping[str, Any],
  stats: Mapping[str, Any],
  epsilon: Any,
  key: jax.Array,
) -> dict[str, Any]:
  """Expands a ConvFFN: the norm adds the bias of the convolution, and factors are 1.

  Args:
    deploy: {conv: {kernel (K, K, 1, C), bias (C,)}, dense: {fc1, fc2}}.
    shapes: shapes and dtypes of the parameters of the training form.
    stats: fresh statistics of the training form.
    epsilon: number added to the variance by the batch norm.
    key: a JAX random key, for branches besides the convolution.

  Returns:
    {spatial, dense, layer_scale}, which folds into `deploy` with these statistics.
  """
  stats, _ = read_notes(stats, epsilon)
  return {
    "spatial": expand_rep_conv(deploy, shapes["spatial"], stats["spatial"], epsilon, key),
    "dense": deploy["dense"],
    "layer_scale": ones_like_scale(shapes["layer_scale"]),
  }
