"""AuxHead: an auxiliary classifier, which helps training and disappears in deploy form.

An auxiliary head that classifies pixels is an `FCNHead` under a name that begins with `AuxHead`.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from repjax.layers.base import RepLayer, leading_axes
from repjax.layers.drawing import draw
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

  mark = "AuxHead"

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, H, W, C) to logits (N, num_classes)."""
    self.write_notes()
    conv = RepConv(
      x.shape[-1],
      branches=("conv3x3",),
      strides=2,
      dilation=self.dilation,
      **self.shared(),
    )
    x = jax.nn.relu(conv(x, train)).mean((1, 2))  # (N, C)
    return linear(x, self.num_classes, name="head", **self.dtypes())


def recognize_aux_head(params: Mapping[str, Any]) -> int | None:
  """Returns the number of leading axes if a scope could be an AuxHead in training form, else None.

  Any scope with nothing but `RepConv_0` of one 3x3 branch and `head` could be one. An `FCNHead` has
  `classifier` in the place of `head`.
  """
  conv, others = params.get("RepConv_0"), params.keys() - {"RepConv_0"}
  if others not in ({"head"}, {"classifier"}) or not isinstance(conv, Mapping):
    return None
  path = (*others, "kernel")
  return leading_axes(params, path, 2) if conv.keys() == {"conv3x3"} else None


def fold_aux_head(params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float) -> None:
  """Folds an AuxHead into nothing, because the deploy form has no such scope."""
  del params, stats, epsilon


def expand_aux_head(
  deploy: None, shapes: Mapping[str, Any], stats: Mapping[str, Any], epsilon: Any, key: jax.Array
) -> dict[str, Any]:
  """Draws a fresh AuxHead, because the deploy form has none.

  Args:
    deploy: not used.
    shapes: shapes and dtypes of the parameters of the training form.
    stats, epsilon: not used.
    key: a JAX random key.

  Returns:
    Parameters of the training form.
  """
  del deploy, stats, epsilon
  return draw(shapes, key)
