"""AuxHead: an auxiliary classifier, which helps training and disappears in deploy form."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from repjax.layers.base import RepLayer
from repjax.layers.linear import linear
from repjax.layers.rep_conv import RepConv


class AuxHead(RepLayer):
  """A classifier of maps in the middle of a network.

  A 3x3 conv-BN at stride 2, ReLU, the mean over all pixels, and a fully connected layer. A deploy
  form of the network has no such head: `fold_aux_head` removes the scope.

  Attributes:
    num_classes: number of outputs.
    dilation: dilation of the convolution, for networks that dilate instead of striding.

  References:
    RepVGGplus, https://github.com/DingXiaoH/RepVGG, repvggplus.py
  """

  num_classes: int
  dilation: int = 1

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, H, W, C) to logits (N, num_classes)."""
    conv = RepConv(
      x.shape[-1],
      branches=("conv3x3",),
      strides=2,
      dilation=self.dilation,
      **self.shared(),
    )
    x = jax.nn.relu(conv(x, train)).mean((1, 2))  # (N, C)
    return linear(x, self.num_classes, name="head", **self.dtypes())


def fold_aux_head(params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float) -> None:
  """Folds an AuxHead into nothing, because the deploy form has no such scope."""
  del params, stats, epsilon
