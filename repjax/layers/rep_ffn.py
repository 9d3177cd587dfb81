"""RepFFN, a feed-forward network over channels that owns the batch norm in front of it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.algebra import absorb_affine, bn_affine
from repjax.layers.activations import activation
from repjax.layers.linear import TwoLayers
from repjax.layers.rep_conv import RepConv, merge_branches
from repjax.layers.rep_norm import EPSILON, batch_norm, refuse_training


class RepFFN(nn.Module):
  """Batch norm, 1x1 conv-BN to more channels, activation, 1x1 conv-BN back.

  y = BN(conv(act(BN(conv(BN(x)))))). All three norms fold: the first into the convolution behind
  it, which is exact at every pixel because a 1x1 has no border that sees padding. The deploy form
  is two fully connected layers over channels with an activation between them.

  Scopes of the training form: `bn`, `expand` and `project`, both RepConvs of one branch. Deploy
  form: `dense` with `expand` and `project`.

  Attributes:
    expansion: how many times wider the hidden layer is.
    act: "relu", "silu" or "gelu".
    epsilon: of the batch norms.
    axis_name: of the pmapped axis over which batch statistics are shared.
    deploy: build the deploy form.
    dtype: of the products and the result; norms are in at least float32.
    param_dtype: of the parameters.

  References:
    Ding et al., RepMLPNet, CVPR 2022, section 3. https://arxiv.org/abs/2112.11081
  """

  expansion: int = 4
  act: str = "gelu"
  epsilon: float = EPSILON
  axis_name: str | None = None
  deploy: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, H, W, C) to the same shape.

    Raises:
      ValueError: `train` in deploy form.
    """
    refuse_training(self.deploy, train)
    hidden, features = self.expansion * x.shape[-1], x.shape[-1]
    if self.deploy:
      names, dtypes = ("expand", "project"), (self.dtype, self.param_dtype)
      return TwoLayers(hidden, names, self.act, *dtypes, name="dense")(x)
    norm: dict[str, Any] = {
      "epsilon": self.epsilon,
      "axis_name": self.axis_name,
      "param_dtype": self.param_dtype,
    }
    one_branch = {"branches": ("conv1x1",), "dtype": self.dtype, **norm}
    y = batch_norm(x, train, **norm).astype(self.dtype)
    y = activation(self.act)(RepConv(hidden, **one_branch, name="expand")(y, train))
    return RepConv(features, **one_branch, name="project")(y, train)


def fold_rep_ffn(
  params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> dict[str, Any]:
  """Folds a RepFFN: its norms go into its two convolutions, which become fully connected layers.

  Args:
    params: {bn: {scale, bias}, expand: {conv1x1: {conv: {kernel}, bn}}, project: the same}; the
      kernels are (1, 1, C, M) and (1, 1, M, C).
    stats: {bn: {mean, var}, expand: {conv1x1: {bn: {mean, var}}}, project: the same}.
    epsilon: of the batch norms.

  Returns:
    {dense: {expand: {kernel (C, M), bias (M,)}, project: {kernel (M, C), bias (C,)}}} in the dtype
    of the kernels.

  Raises:
    ValueError: the two trees do not belong together, or a kernel is not 1x1.
  """
  wanted = {"bn", "expand", "project"}
  if params.keys() != wanted or stats.keys() != wanted:
    raise ValueError(
      f"a RepFFN holds {', '.join(sorted(wanted))}; got parameters of {sorted(params)} and "
      f"statistics of {sorted(stats)}"
    )
  layers = {}
  for name in ("expand", "project"):
    conv = merge_branches(params[name], stats[name], epsilon)
    if conv.kernel.shape[:2] != (1, 1):
      raise ValueError(f"{name} of a RepFFN is 1x1, got a kernel {conv.kernel.shape}")
    layers[name] = conv.kernel[0, 0], conv.bias
  layers["expand"] = absorb_affine(bn_affine(params["bn"], stats["bn"], epsilon), *layers["expand"])
  dtype = params["expand"]["conv1x1"]["conv"]["kernel"].dtype
  return {
    "dense": {
      name: {"kernel": kernel.astype(dtype), "bias": bias.astype(dtype)}
      for name, (kernel, bias) in layers.items()
    }
  }
