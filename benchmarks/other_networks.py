"""EfficientNet-B0 and RegNetX-3.2GF in Flax, for comparison with RepVGG in one runtime.

Each network is in the form in which it is shipped: norms are merged into the convolutions, which
have biases instead. Weights are random. Parameters and multiplications are those of timm's networks
after the same merge.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def conv(x: Any, features: int, size: int, stride: int = 1, groups: int = 1) -> Any:
  """Computes a convolution with a bias."""
  padding = [(size // 2, size // 2)] * 2
  return nn.Conv(features, (size, size), stride, padding=padding, feature_group_count=groups)(x)


class EfficientNetB0(nn.Module):
  """EfficientNet-B0.

  References:
    Tan and Le, EfficientNet, ICML 2019, Table 1. https://arxiv.org/abs/1905.11946
  """

  num_classes: int = 1000

  @nn.compact
  def __call__(self, x: Any) -> Any:
    x = nn.silu(conv(x, 32, 3, 2))
    for expansion, features, depth, stride, size in (
      (1, 16, 1, 1, 3),
      (6, 24, 2, 2, 3),
      (6, 40, 2, 2, 5),
      (6, 80, 3, 2, 3),
      (6, 112, 3, 1, 5),
      (6, 192, 4, 2, 5),
      (6, 320, 1, 1, 3),
    ):
      for index in range(depth):
        x = _mobile_block(x, expansion, features, stride if index == 0 else 1, size)
    x = nn.silu(conv(x, 1280, 1))
    return nn.Dense(self.num_classes)(x.mean((1, 2)))


def _mobile_block(x: Any, expansion: int, features: int, stride: int, size: int) -> Any:
  """Computes a depthwise block with squeeze and excitation, and the shortcut where it fits."""
  inputs = x.shape[-1]
  y = nn.silu(conv(x, inputs * expansion, 1)) if expansion > 1 else x
  y = nn.silu(conv(y, y.shape[-1], size, stride, groups=y.shape[-1]))
  gate = nn.silu(conv(y.mean((1, 2), keepdims=True), inputs // 4, 1))
  y = conv(y * nn.sigmoid(conv(gate, y.shape[-1], 1)), features, 1)
  return x + y if x.shape == y.shape else y


class RegNetX32(nn.Module):
  """RegNetX-3.2GF.

  References:
    Radosavovic et al., Designing Network Design Spaces, CVPR 2020, Figure 16.
    https://arxiv.org/abs/2003.13678
  """

  num_classes: int = 1000

  @nn.compact
  def __call__(self, x: Any) -> Any:
    x = nn.relu(conv(x, 32, 3, 2))
    for depth, features in ((2, 96), (6, 192), (15, 432), (2, 1008)):
      for index in range(depth):
        x = _grouped_block(x, features, 2 if index == 0 else 1)
    return nn.Dense(self.num_classes)(x.mean((1, 2)))


def _grouped_block(x: Any, features: int, stride: int) -> Any:
  """Computes a residual block whose 3x3 convolution has groups of 48 channels."""
  y = nn.relu(conv(x, features, 1))
  y = nn.relu(conv(y, features, 3, stride, groups=features // 48))
  y = conv(y, features, 1)
  shortcut = x if x.shape == y.shape else conv(x, features, 1, stride)
  return nn.relu(y + shortcut)


NETWORKS = {
  "efficientnet_b0": EfficientNetB0,
  "regnetx_032": RegNetX32,
}


def create(name: str, image_size: int) -> tuple[nn.Module, Any]:
  """Returns a network of this file, and random variables."""
  network = NETWORKS[name]()
  images = jnp.zeros((1, image_size, image_size, 3))
  return network, jax.jit(network.init)(jax.random.key(0), images)
