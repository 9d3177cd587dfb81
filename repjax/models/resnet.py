"""ResNet: every convolution and the batch norm after it are a RepConv of one branch.

A stage is a row of blocks whose maps have one size. Two kinds of blocks exist, `BasicBlock` and
`Bottleneck`. Each adds the input of the block, the shortcut, to the output of the convolutions.

The deploy form holds convolutions with bias, activations, sums with shortcuts, one max-pool, a
global mean and a linear classifier. It holds no batch norm and no statistics. The stride of a
bottleneck is on its 3x3 convolution, as in torchvision and timm.

References:
  He et al., Deep Residual Learning for Image Recognition, CVPR 2016, Table 1.
    https://arxiv.org/abs/1512.03385
  Yu et al., Dilated Residual Networks, CVPR 2017, section 2, for `output_stride`.
    https://arxiv.org/abs/1705.09914
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from repjax.errors import InputError, unknown
from repjax.models.base import Block, BlockBuilder, Classifier, Stage
from repjax.models.checks import (
  check_last_strides,
  check_number,
  check_whole,
)
from repjax.models.dilation import block_stridings, check_dilated_blocks, dilate


class Place(NamedTuple):
  """The position of a block in the network, and the shape that the position asks for.

  Attributes:
    stage: number of the stage, 1 to 4; papers on detection call these stages c2 to c5.
    number: number of the block in its stage, from 0.
    features: number of output channels.
    strides: 2 if the block halves the map, else 1.
    dilation_before: dilation of the convolutions before the stage's dilation grows. Equal to
      `dilation`, except perhaps in the first block of a stage that dilates.
    dilation: dilation of the later convolutions. Both are 1 unless `output_stride` is below 32.
  """

  stage: int
  number: int
  features: int
  strides: int
  dilation_before: int
  dilation: int


class ResidualBlock(Block):
  """A block with a shortcut around it; the base of all blocks of a ResNet.

  Attributes:
    place: position in the network.
  """

  place: Place

  @nn.nowrap
  def shortcut(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns the input of the block in the shape of its output.

    The first block of a stage has a 1x1 conv-BN here, in the scope `RepConv_shortcut`. Stages 2 to
    4 always have one. Stage 1 has one only if the number of channels changes. The conv-BN changes
    the shape, unless the stage dilates and keeps the number of channels.
    """
    place = self.place
    # Stages 2 to 4 have the 1x1 conv-BN even if they keep the shape, as a stage that dilates may.
    # So the parameters do not depend on `output_stride`.
    if x.shape[-1] == place.features and (place.number > 0 or place.stage == 1):
      return x
    return self.conv_bn("shortcut", place.features, 1, place.strides)(x, train)


class BasicBlock(ResidualBlock):
  """Two 3x3 convolutions, a sum with the shortcut, and an activation.

  Scopes: `RepConv_conv1`, `RepConv_conv2`, `RepConv_shortcut`.
  """

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, C) to (N, H / strides, W / strides, features)."""
    place = self.place
    y = self.conv_bn("conv1", place.features, 3, place.strides, place.dilation_before)(x, train)
    y = self.conv_bn("conv2", place.features, 3, dilation=place.dilation)(self.activate(y), train)
    return self.activate(y + self.shortcut(x, train))


class Bottleneck(ResidualBlock):
  """A 1x1 convolution to a quarter of the features, a 3x3, a 1x1, and a sum with the shortcut.

  An activation follows the first two convolutions and the sum. Scopes: `RepConv_conv1`,
  `RepConv_conv2`, `RepConv_conv3`, `RepConv_shortcut`.
  """

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, C) to (N, H / strides, W / strides, features)."""
    place, inner = self.place, self.place.features // 4
    y = self.conv_bn("conv1", inner, 1)(x, train)
    y = self.activate(y)
    y = self.conv_bn("conv2", inner, 3, place.strides, place.dilation_before)(y, train)
    y = self.activate(y)
    y = self.conv_bn("conv3", place.features, 1)(y, train)
    return self.activate(y + self.shortcut(x, train))


BLOCKS: dict[str, type[ResidualBlock]] = {"basic": BasicBlock, "bottleneck": Bottleneck}
"""Name to class of a block."""


STRIDES = (4, 1, 2, 2, 2)
"""Strides of the stem and of the four stages."""


class Stem(Block):
  """A 7x7 convolution at stride 2, an activation, and a 3x3 max-pool at stride 2.

  Attributes:
    features: number of output channels.
  """

  features: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, C) to (N, H/4, W/4, features)."""
    x = self.conv_bn("0", self.features, 7, strides=2)(x, train)  # (N, H/2, W/2, features)
    # Linen annotates no type, and type checkers infer a string from the default "VALID".
    padding: Any = ((1, 1), (1, 1))
    return nn.max_pool(self.activate(x), (3, 3), (2, 2), padding)


class ResNet(Classifier, kw_only=True):
  """A 7x7 stem, four stages of residual blocks, a global mean, and a linear classifier.

  Scopes: `stem`, `stage1` ... `stage4` with `block0`, `block1`, ..., and `head`. Images are at
  least `output_stride` pixels high and wide; odd sizes are rounded up. With `features_only` the
  maps are "stage1" (N, H/4, W/4, C1) to "stage4" (N, H/32, W/32, C4). With a smaller
  `output_stride` the last maps are larger.

  A family with different blocks in some places is a subclass with a new `block_at`. Attributes that
  the subclass adds can be set in `create_model`, like the attributes below.

  Attributes besides those of `Classifier`:
    stage_sizes: number of blocks in each of the four stages.
    widths: number of output channels of each stage.
    block: "basic" or "bottleneck".
    stem_features: number of output channels of the stem.
    output_stride: ratio of the size of the image to the size of the last map: 32, 16 or 8. Below 32
      the last stages dilate instead of striding. Parameters stay the same. In evaluation, every
      second or fourth pixel of the larger maps has the same value as at `output_stride` 32. In
      training these values differ, because batch statistics are taken over more pixels.
    dilated_blocks: number of last blocks that dilate, with a smaller `output_stride`. All 3x3
      convolutions of these blocks then have the dilation of their stage, and blocks before have
      none. PSPNet dilates the whole last two stages in this way, which are 9 blocks of ResNet-50.
      None: the first block of a stage that dilates has the dilation of the stage before, which
      keeps the values above.
  """

  stage_sizes: Sequence[int] = (3, 4, 6, 3)
  widths: Sequence[int] = (256, 512, 1024, 2048)
  block: str = "bottleneck"
  stem_features: int = 64
  output_stride: int = 32
  dilated_blocks: int | None = None

  def __post_init__(self):
    for field in ("stage_sizes", "widths"):
      check_whole(field, getattr(self, field), 4)
    check_number("stem_features", self.stem_features)
    if self.block not in BLOCKS:
      raise unknown("block of a ResNet", self.block, BLOCKS)
    if self.block == "bottleneck" and any(width % 4 for width in self.widths):
      raise InputError(
        f"a bottleneck is a quarter as wide as its output, so widths must be multiples of 4, got "
        f"{self.widths}"
      )
    check_last_strides(self.output_stride)
    _, *stridings = dilate(STRIDES, self.output_stride)
    check_dilated_blocks(self.dilated_blocks, self.stage_sizes, stridings)
    super().__post_init__()

  @nn.nowrap
  def total_stride(self) -> int:
    """Returns the ratio of the size of the image to the size of the last map."""
    return self.output_stride

  @nn.nowrap
  def maps(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
    """Runs the stem and the stages, and returns the output of each stage."""
    x = Stem(self.stem_features, **self.shared(), name="stem")(x, train)
    maps = {}
    for name, places in self.stages():
      x = maps[name] = Stage([self.build(place) for place in places], name=name)(x, train)
    return maps

  @nn.nowrap
  def build(self, place: Place) -> BlockBuilder:
    """Returns the builder of the block at a place."""
    block, attributes = self.block_at(place)
    return functools.partial(self.builder(block), place=place, **attributes)

  def block_at(self, place: Place) -> tuple[type[ResidualBlock], dict[str, Any]]:
    """Returns the block class at a place, and its extra constructor arguments."""
    del place  # every place has the same class here; subclasses look at the place
    return BLOCKS[self.block], {}

  def stages(self) -> Iterator[tuple[str, tuple[Place, ...]]]:
    """Yields the name of each stage and the places in the stage, in order."""
    _, *stridings = dilate(STRIDES, self.output_stride)  # the stem comes first
    rows = block_stridings(self.stage_sizes, stridings, self.dilated_blocks)
    for stage, (features, row) in enumerate(zip(self.widths, rows), 1):
      places = (
        Place(stage, number, features, each.strides, each.dilation_before, each.dilation)
        for number, each in enumerate(row)
      )
      yield f"stage{stage}", tuple(places)


_BASIC = {"block": "basic", "widths": (64, 128, 256, 512)}
_BOTTLENECK = {"block": "bottleneck", "widths": (256, 512, 1024, 2048)}

VARIANTS: dict[str, dict[str, Any]] = {
  "resnet18": _BASIC | {"stage_sizes": (2, 2, 2, 2)},
  "resnet34": _BASIC | {"stage_sizes": (3, 4, 6, 3)},
  "resnet50": _BOTTLENECK | {"stage_sizes": (3, 4, 6, 3)},
  "resnet101": _BOTTLENECK | {"stage_sizes": (3, 4, 23, 3)},
  "resnet152": _BOTTLENECK | {"stage_sizes": (3, 8, 36, 3)},
}
