"""VGG-16 with batch norm, the plain network without branches.

Every 3x3 convolution and the batch norm after it are a RepConv of one branch. The deploy form is
VGG-16 without batch norm. It holds convolutions, max-pools, activations and fully connected layers.

References:
  Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition,
    ICLR 2015, Table 1, configuration D. https://arxiv.org/abs/1409.1556
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn

from repjax.layers import RepConv, activation, linear
from repjax.layers.linear import bias_init, kernel_init
from repjax.layers.resampling import pool_to
from repjax.models.base import Block, Classifier, Stage, last_of
from repjax.models.checks import check_number, check_whole

STAGE_SIZES = (2, 2, 3, 3, 3)
POOLED = 7
"""Height and width of the map that the first fully connected layer reads."""


class VGGBlock(Block):
  """A 3x3 convolution, a batch norm, and an activation.

  The convolution has a bias in training form too, as in every released checkpoint with batch norm.
  The norm subtracts the mean, and with it this bias.

  Attributes:
    features: number of output channels.
  """

  features: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, C) to (N, H, W, features)."""
    conv = RepConv(self.features, branches=("conv3x3",), conv_bias=True, **self.shared())
    return self.activate(conv(x, train))


def halve(x: jax.Array) -> jax.Array:
  """Applies a 2x2 max-pool at stride 2; rows and columns that fill no window are left out."""
  return nn.max_pool(x, (2, 2), (2, 2))  # (N, H/2, W/2, C)


class VGG(Classifier, kw_only=True):
  """Five stages of 3x3 convolutions, each with a max-pool at its end, and three dense layers.

  Scopes: `stage1` ... `stage5` with `block0`, `block1`, ..., then `fc1`, `fc2` and `head`. Images
  are at least 32 pixels high and wide. The last map of any image is pooled to 7x7, as in
  torchvision. The kernel of `fc1` is (7, 7, C, O), so that the tree tells in which order the map is
  read.

  With `features_only` the maps are "stage2" (N, H/4, W/4, C2) to "stage5" (N, H/32, W/32, C5), each
  after the max-pool. The dropout rate applies after both hidden layers.

  Attributes besides those of `Classifier`:
    widths: number of output channels of each of the five stages.
    hidden: width of the two hidden fully connected layers.
  """

  widths: Sequence[int] = (64, 128, 256, 512, 512)
  hidden: int = 4096
  dropout: float = 0.5

  def __post_init__(self):
    check_whole("widths", self.widths, len(STAGE_SIZES))
    check_number("hidden", self.hidden)
    super().__post_init__()

  @nn.nowrap
  def total_stride(self) -> int:
    """Returns the ratio of the size of the image to the size of the last map."""
    return 2 ** len(STAGE_SIZES)

  @nn.nowrap
  def maps(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
    """Runs the five stages, and returns the outputs of the last four."""
    maps = {}
    for number, (size, features) in enumerate(zip(STAGE_SIZES, self.widths), 1):
      block = functools.partial(self.builder(VGGBlock), features)
      x = maps[f"stage{number}"] = Stage(size * [block], last=halve, name=f"stage{number}")(
        x, train
      )
    del maps["stage1"]  # at stride 2, which no feature pyramid reads
    return maps

  @nn.nowrap
  def classify(self, maps: Mapping[str, jax.Array], train: bool) -> jax.Array:
    """Returns logits (N, num_classes) from three fully connected layers over the pooled map."""
    x = pool_to(last_of(maps), POOLED)  # (N, 7, 7, C)
    act, dropout = activation(self.act), nn.Dropout(self.dropout, deterministic=not train)
    x = nn.DenseGeneral(
      self.hidden,
      axis=(1, 2, 3),
      name="fc1",
      kernel_init=kernel_init,
      bias_init=bias_init((*x.shape[1:], self.hidden)),
      **self.dtypes(),
    )(x)  # (N, hidden)
    x = linear(dropout(act(x)), self.hidden, name="fc2", **self.dtypes())
    return linear(dropout(act(x)), self.num_classes, name="head", **self.dtypes())


VARIANTS: dict[str, dict[str, Any]] = {"vgg16": {}}
