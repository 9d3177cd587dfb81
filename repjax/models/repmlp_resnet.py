"""RepMLP-ResNet: a ResNet-50 in which some blocks hold a RepMLP.

The deploy form holds convolutions with bias, the fully connected layers that a RepMLP leaves (see
repmlp.py), activations, sums with shortcuts, one max-pool, a mean and a linear classifier. It holds
no batch norm and no statistics.

References:
  Ding et al., RepMLP, 2021, sections 3.4 and 4.2. https://arxiv.org/abs/2105.01883
  https://github.com/DingXiaoH/RepMLP at 2aba6f5
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.core import FrozenDict

from repjax.errors import InputError, unknown
from repjax.layers.composition import pair
from repjax.models.checks import (
  check_kernels,
  check_tile,
  check_whole,
  is_list,
  is_whole,
)
from repjax.models.repmlp import RepMLP
from repjax.models.resnet import Place, ResidualBlock, ResNet


class LightBlock(ResidualBlock):
  """A 1x1 convolution to an eighth of the features, a RepMLP, a 1x1, and a sum with the input.

  Attributes:
    repmlp: attributes of the RepMLP besides its width and those of the block.
  """

  repmlp: Mapping[str, Any]

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, features) to the same shape."""
    inner = self.place.features // 8
    y = self.activate(self.conv_bn("light_conv1", inner, 1)(x, train))
    y = RepMLP(inner, **self.repmlp, **self.shared(), name="light_repmlp")(y, train)
    y = self.conv_bn("light_conv3", self.place.features, 1)(self.activate(y), train)
    return self.activate(y + x)


class RepMLPBottleneck(ResidualBlock):
  """A bottleneck with a RepMLP between two 3x3 convolutions, and a sum with the input.

  A 1x1 convolution leads to a quarter of the features, a 3x3 to `narrowing` times fewer, and after
  the RepMLP a 3x3 and a 1x1 lead back.

  Attributes:
    repmlp: attributes of the RepMLP besides its width and those of the block.
    narrowing: ratio of a quarter of the features to the width of the RepMLP.
  """

  repmlp: Mapping[str, Any]
  narrowing: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, features) to the same shape."""
    quarter, dilation = self.place.features // 4, self.place.dilation
    inner = quarter // self.narrowing
    y = self.activate(self.conv_bn("btnk_conv1", quarter, 1)(x, train))
    y = self.activate(self.conv_bn("btnk_conv2", inner, 3, dilation=dilation)(y, train))
    y = RepMLP(inner, **self.repmlp, **self.shared(), name="btnk_repmlp")(y, train)
    y = self.conv_bn("btnk_conv4", quarter, 3, dilation=dilation)(self.activate(y), train)
    y = self.conv_bn("btnk_conv5", self.place.features, 1)(self.activate(y), train)
    return self.activate(y + x)


BLOCKS: dict[str, type[ResidualBlock]] = {"light": LightBlock, "bottleneck": RepMLPBottleneck}
"""Name to class of a block with a RepMLP."""

_PER_STAGE = ", one for each of repmlp_stages"


def _each(value: int | Sequence[int], stages: Sequence[int]) -> Sequence[int]:
  """Returns a value for each stage, from one value for all stages or one for each."""
  return (value,) * len(stages) if isinstance(value, int) else value


class RepMLPResNet(ResNet, kw_only=True):
  """A ResNet of bottlenecks with a RepMLP in all blocks but the first of some stages.

  A smaller `output_stride` keeps every second pixel of convolutions. Layers over tiles change,
  because tiles lie elsewhere on larger maps.

  The Global Perceptrons have parameters for one image size. By default the size is 32 times the
  tile: the second stage then has 4x4 tiles, the third 2x2, and the fourth one tile. Any size will
  do for which the map of every stage with RepMLP divides into tiles.

  Attributes besides those of `ResNet`:
    repmlp_block: "bottleneck" or "light".
    repmlp_stages: numbers of the stages with RepMLP, 1 to 4; (2, 3) are c3 and c4 of the paper.
    tile: height and width of a tile in pixels, one number or (h, w).
    local_kernels: sizes of the local convolutions; none leaves the Local Perceptron out.
    fc3_groups: number of groups of FC3 and of the local convolutions; one number, or one for each
      of `repmlp_stages`.
    reduction: ratio of the widths of the Global Perceptron's input and of its hidden layer; one
      number, or one for each of `repmlp_stages`.
    narrowing: ratio of the widths of a bottleneck and of its RepMLP, for each of `repmlp_stages`;
      called r in the paper.
    global_perceptron: build the Global Perceptrons.
  """

  repmlp_block: str = "bottleneck"
  repmlp_stages: Sequence[int] = (2, 3)
  tile: int | Sequence[int] = 7
  local_kernels: Sequence[int] = (1, 3, 5)
  fc3_groups: int | Sequence[int] = 8
  reduction: int | Sequence[int] = 1
  narrowing: Sequence[int] = (2, 4)
  global_perceptron: bool = True

  def __post_init__(self):
    stages = self.repmlp_stages
    if not (is_list(stages) and all(is_whole(stage) and stage <= 4 for stage in stages)) or (
      sorted(set(stages)) != list(stages)
    ):
      raise InputError(f"repmlp_stages are ascending numbers of stages, 1 to 4, got {stages!r}")
    if self.repmlp_block not in BLOCKS:
      raise unknown("repmlp_block", self.repmlp_block, BLOCKS)
    if self.block != "bottleneck":
      raise InputError(f'a RepMLP-ResNet has block="bottleneck", got {self.block!r}')
    check_whole("fc3_groups", _each(self.fc3_groups, stages), len(stages), _PER_STAGE)
    if self.repmlp_block == "bottleneck":
      check_whole("narrowing", self.narrowing, len(stages), _PER_STAGE)
    check_tile("tile", self.tile)
    check_kernels(self.local_kernels, self.tile)
    check_whole("reduction", _each(self.reduction, stages), len(stages), _PER_STAGE)
    # A function, not a method: interceptors of methods cannot take a module that is not set up yet.
    _check_widths(self)
    super().__post_init__()

  @property
  def image_size(self) -> int:
    """The side in pixels of the images that the model is made for."""
    return 32 * math.lcm(*pair(self.tile))

  @nn.nowrap
  def check_images(self, images: jax.Array) -> None:
    """Raises InputError if images are too small, or maps do not divide into tiles."""
    super().check_images(images)
    strides = [min(2 ** (stage + 1), self.output_stride) for stage in self.repmlp_stages]
    for axis, side in zip((1, 2), pair(self.tile)):
      if any(-(-images.shape[axis] // stride) % side for stride in strides):
        unit = [max(strides) * side for side in pair(self.tile)]
        raise InputError(
          f"this RepMLP-ResNet cuts the maps of stages {tuple(self.repmlp_stages)} into tiles of "
          f"{'x'.join(map(str, pair(self.tile)))} pixels, so images are (N, H, W, C) with H and W "
          f"multiples of {unit[0]} by {unit[1]} pixels; got {images.shape}. Change the image size "
          "or the tile"
        )

  def block_at(self, place: Place) -> tuple[type[ResidualBlock], dict[str, Any]]:
    """Returns the class of the block at a place, and the attributes that only this class has."""
    if place.stage not in self.repmlp_stages or place.number == 0:
      return super().block_at(place)
    index = tuple(self.repmlp_stages).index(place.stage)
    arguments: dict[str, Any] = {
      "tile": self.tile,
      "groups": _each(self.fc3_groups, self.repmlp_stages)[index],
      "reduction": _each(self.reduction, self.repmlp_stages)[index],
      "local_kernels": tuple(self.local_kernels),
      "global_perceptron": self.global_perceptron,
    }
    attributes: dict[str, Any] = {"repmlp": FrozenDict(arguments)}
    if self.repmlp_block == "bottleneck":
      attributes["narrowing"] = self.narrowing[index]
    return BLOCKS[self.repmlp_block], attributes


def _check_widths(network: RepMLPResNet) -> None:
  """Raises InputError if a RepMLP would not be a whole number of channels wide."""
  check_whole("widths", network.widths, 4)
  light = network.repmlp_block == "light"
  for index, stage in enumerate(network.repmlp_stages):
    divisor = 8 if light else 4 * network.narrowing[index]
    if network.widths[stage - 1] % divisor:
      why = "an eighth as wide" if light else "a quarter as wide and then narrowed"
      raise InputError(
        f"the RepMLP of a {network.repmlp_block} block is {why}, so stage {stage} must have a "
        f"multiple of {divisor} channels, got widths={network.widths!r}"
        + ("" if light else f" and narrowing={network.narrowing!r}")
      )


VARIANTS: dict[str, dict[str, Any]] = {
  "repmlp_resnet50_light": {"repmlp_block": "light", "fc3_groups": 4},
  "repmlp_resnet50_bottleneck_g4": {"fc3_groups": 4},
  "repmlp_resnet50_bottleneck_g8": {"fc3_groups": 8},
}
