"""MobileOne: depthwise 3x3 and pointwise convolutions in turn, trained with several copies of each.

In training form every block is a RepConv. A depthwise block has some branches conv3x3, one conv1x1
and, where it keeps the shape, identity. A pointwise block has some branches conv1x1 and, where it
keeps the number of channels, identity.

In deploy form a block is one convolution with bias, and the activation. The deploy form holds no
batch norm and no statistics. Two things stay besides the convolutions.

- Squeeze-and-excitation, which only the largest network has, multiplies by numbers computed from
  the image.
- A depthwise block and the pointwise block after it stay two convolutions, because an activation
  lies between them.

References:
  Vasu et al., MobileOne: An Improved One millisecond Mobile Backbone, CVPR 2023, section 3 and
    Table 2. https://arxiv.org/abs/2206.04040
  Yu et al., Dilated Residual Networks, CVPR 2017, section 2, for `output_stride`.
    https://arxiv.org/abs/1705.09914
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import linen as nn

from repjax.errors import InputError
from repjax.models.base import BlockBuilder, Classifier, Stage
from repjax.models.checks import (
  check_multiplied_stages,
  check_number,
  check_output_stride,
  is_list,
)
from repjax.models.dilation import Striding, dilate
from repjax.models.repvgg import RepVGGBlock

SE_REDUCTION = 16
"""Ratio of a block's number of channels to the width of the hidden layer in its gate."""
MOST_BRANCHES = 16
"""Largest number of copies of a convolution."""


def block_branches(size: int, copies: int) -> tuple[str, ...]:
  """Returns the branches of a block that keeps the shape.

  Args:
    size: height and width of the block's kernel, 1 or 3.
    copies: number of convolutions of this size.
  """
  kernel = f"conv{size}x{size}"
  repeats = (f"{kernel}_{number}" for number in range(1, copies))
  small = ("conv1x1",) if size > 1 else ()
  return (kernel, *repeats, *small, "identity")


class MobileOne(Classifier, kw_only=True):
  """A stem, four stages of depthwise and pointwise blocks, a global mean, and a linear classifier.

  Scopes: `stem`, `stage1` ... `stage4` with `block0`, `block1`, ..., and `head`. Blocks of a stage
  are depthwise and pointwise in turn, so that a stage has twice as many blocks as `stage_sizes`
  says. Every block is a `RepVGGBlock`, with the scopes `RepConv_0` and perhaps `SqueezeExcite_0`.

  Images are at least as high and wide as the total stride; odd sizes are rounded up. With
  `features_only` the maps are "stage1" (N, H/4, W/4, C1) to "stage4" (N, H/32, W/32, C4). Maps have
  different sizes with different `strides`, and the last maps are larger with a smaller
  `output_stride`.

  Attributes besides those of `Classifier`:
    stage_sizes: number of pairs of blocks, depthwise and pointwise, in each of the four stages.
    width_multipliers: factors of 64, 128, 256 and 512 channels. The stem has at most 64 channels.
    copies: number of convolutions of the largest size in every block but the stem, which has one.
    se_sizes: number of pairs at the end of each stage that have squeeze-and-excitation.
    strides: strides of the stem and of the first block of each stage.
    output_stride: ratio of the size of the image to the size of the last map. None is the product
      of all `strides`. The products up to earlier stages (16, 8, ...) are allowed too; later stages
      then dilate instead of striding. Parameters stay the same, and so do the maps at every second
      or fourth pixel. With squeeze-and-excitation the maps change, because its means are then over
      more pixels.
  """

  stage_sizes: Sequence[int] = (2, 8, 10, 1)
  width_multipliers: Sequence[float]
  copies: int = 1
  se_sizes: Sequence[int] = (0, 0, 0, 0)
  strides: Sequence[int] = (2, 2, 2, 2, 2)
  output_stride: int | None = None

  def __post_init__(self):
    check_multiplied_stages(self)
    check_output_stride(self)
    check_number("copies", self.copies)
    if self.copies > MOST_BRANCHES:
      raise InputError(f"copies is at most {MOST_BRANCHES}, got {self.copies}")
    sizes = self.se_sizes
    if not (is_list(sizes) and len(sizes) == 4 and _fit(sizes, self.stage_sizes)):
      raise InputError(
        f"se_sizes takes 4 whole numbers, each at most that of stage_sizes={self.stage_sizes}, got "
        f"{sizes!r}"
      )
    super().__post_init__()

  @nn.nowrap
  def total_stride(self) -> int:
    """Returns the ratio of the size of the image to the size of the last map."""
    return self.output_stride or math.prod(self.strides)

  @nn.nowrap
  def maps(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
    """Runs the stem and the stages, and returns the output of each stage."""
    channels = min(64, int(64 * self.width_multipliers[0]))
    first, *stridings = dilate(self.strides, self.output_stride)
    stem = functools.partial(self.builder(RepVGGBlock), groups=1, se=None, se_reduction=1)
    x = stem(features=channels, striding=first, branches=block_branches(3, 1), name="stem")(
      x, train
    )
    maps = {}
    for index, striding in enumerate(stridings):
      features = int(64 * 2**index * self.width_multipliers[index])
      blocks, name = list(self.blocks_of(index, channels, features, striding)), f"stage{index + 1}"
      x = maps[name] = Stage(blocks, name=name)(x, train)
      channels = features
    return maps

  @nn.nowrap
  def blocks_of(
    self, index: int, channels: int, features: int, striding: Striding
  ) -> Iterator[BlockBuilder]:
    """Yields the builders of the blocks of a stage.

    Args:
      index: number of the stage, from 0.
      channels: number of channels that the stage reads.
      features: number of channels that the stage makes.
      striding: stride and dilation of the first block.
    """
    block = functools.partial(self.builder(RepVGGBlock), se_reduction=SE_REDUCTION)
    size = self.stage_sizes[index]
    for pair in range(size):
      se = "pre" if pair >= size - self.se_sizes[index] else None
      depthwise = {"features": channels, "groups": channels, "striding": striding}
      yield functools.partial(block, se=se, branches=block_branches(3, self.copies), **depthwise)
      channels, striding = features, striding.later
      pointwise = {"features": features, "groups": 1, "striding": striding}
      yield functools.partial(block, se=se, branches=block_branches(1, self.copies), **pointwise)


def _fit(sizes: Sequence[int], stage_sizes: Sequence[int]) -> bool:
  """Tells if each of some numbers is whole, at least 0, and at most the one of its stage."""
  whole = all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
  return whole and all(0 <= size <= most for size, most in zip(sizes, stage_sizes))


VARIANTS: dict[str, dict[str, Any]] = {
  "mobileone_s0": {"width_multipliers": (0.75, 1, 1, 2), "copies": 4},
  "mobileone_s1": {"width_multipliers": (1.5, 1.5, 2, 2.5)},
  "mobileone_s2": {"width_multipliers": (1.5, 2, 2.5, 4)},
  "mobileone_s3": {"width_multipliers": (2, 2.5, 3, 4)},
  "mobileone_s4": {"width_multipliers": (3, 3.5, 3.5, 4), "se_sizes": (0, 0, 5, 1)},
}
