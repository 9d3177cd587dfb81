"""The auxiliary classifier, which helps training and disappears in deploy form."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.layers.linear import linear
from repjax.layers.rep_conv import RepConv


class AuxHead(nn.Module):
  """3x3 conv-BN at stride 2, ReLU, global mean, linear: logits from the middle of a network.

  There is no deploy form: `fold_aux_head` removes the scope.

  Attributes:
    num_classes: outputs.
    dilation: of the convolution, where the network dilates instead of striding.
    axis_name: of the pmapped axis over which batch statistics are shared.
    dtype: of the computation and the result.
    param_dtype: of the parameters.

  References:
    RepVGGplus, https://github.com/DingXiaoH/RepVGG, repvggplus.py
  """

  num_classes: int
  dilation: int = 1
  axis_name: str | None = None
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    x = RepConv(
      x.shape[-1],
      branches=("conv3x3",),
      strides=2,
      dilation=self.dilation,
      axis_name=self.axis_name,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
    )(x, train)
    x = jax.nn.relu(x).mean((1, 2))  # (N, C)
    return linear(x, self.num_classes, name="head", dtype=self.dtype, param_dtype=self.param_dtype)


def fold_aux_head(params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float) -> None:
  """Folds an AuxHead into nothing: the deploy form has none."""
  del params, stats, epsilon
