"""FastViT: token mixers without a shortcut, depthwise convolutional FFNs, and attention at the end.

In training form stem, down-sampling and last convolution are RepConvs with the branches of
MobileOne. A block has two parts, each added to its input.

- The token mixer is a RepMixer, whose shortcut is inside of it. In the last stage of some networks
  it is attention over pixels, after a norm, times a factor for each channel.
- The FFN is a depthwise 7x7 conv-BN, two fully connected layers over channels, and a factor for
  each channel.

Training may leave out attention and FFNs at random, each for some images of a batch (drop path).

A stage with attention begins with a depthwise 7x7 convolution added to its input, which tells
attention where pixels are.

In deploy form a RepMixer is one depthwise convolution with bias, and so is the beginning of a stage
with attention. An FFN is one depthwise convolution with bias and two fully connected layers.
Attention has two fully connected layers with bias. The deploy form holds no norm, no factors and no
statistics. timm's conversion keeps the norms and the factors of FFNs and attention. Four things
stay, each for its own reason.

- The sums of an FFN or of attention and its input pass around a function that is not affine.
- Attention multiplies maps with each other, and squeeze-and-excitation after the last convolution
  multiplies by numbers computed from the image.
- A depthwise convolution and the layer over channels after it stay apart, in FFNs and between
  stages. As one 7x7 convolution they would need about 49 or 25 times as many multiplications.
- Activations end the convolutions of the stem, those between stages, and the last one.

References:
  Vasu et al., FastViT: A Fast Hybrid Vision Transformer using Structural Reparameterization, ICCV
    2023, section 3 and Table 2. https://arxiv.org/abs/2303.14189
  Huang et al., Deep Networks with Stochastic Depth, ECCV 2016. https://arxiv.org/abs/1603.09382
  https://github.com/apple/ml-fastvit at 3a6af9e, models/fastvit.py, for widths and sizes
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn

from repjax.errors import InputError
from repjax.layers import ConvFFN, RepAttention, RepConv, RepMixer, SkipConv
from repjax.models.base import Block, BlockBuilder, Classifier, Stage, last_of, run
from repjax.models.checks import check_number, check_rate, check_stages
from repjax.models.dilation import Striding
from repjax.models.mobileone import SE_REDUCTION, block_branches
from repjax.models.repvgg import RepVGGBlock

LAST_EXPANSION = 2
"""Ratio of the number of channels that the classifier reads to the last stage's."""
_KEEPS, _HALVES = Striding(1, 1, 1), Striding(2, 1, 1)


class ResidualBlock(Block):
  """The base of both blocks, which end with an FFN added to its input.

  Attributes:
    expansion: ratio of the width of the FFN's hidden layer to its input's.
    drop_path: probability with which training leaves out what is added, for each image by itself.
  """

  expansion: int
  drop_path: float

  @nn.nowrap
  def mix_channels(self, x: jax.Array, train: bool) -> jax.Array:
    """Adds the FFN, in the scope `ConvFFN_0`."""
    ffn = ConvFFN(self.expansion, act=self.act, **self.shared(), name="ConvFFN_0")
    return x + self.dropped(ffn(x, train), train)

  @nn.nowrap
  def dropped(self, x: jax.Array, train: bool) -> jax.Array:
    """Replaces the maps of some images by zero in training, and divides those that stay.

    With the rate r, a map stays with the probability 1 - r and is divided by 1 - r, so that the
    mean is that of evaluation.
    """
    of_an_image = tuple(range(1, x.ndim))  # One number decides about a whole map.
    return nn.Dropout(self.drop_path, broadcast_dims=of_an_image, deterministic=not train)(x)


class MixerBlock(ResidualBlock):
  """A RepMixer, and an FFN added to its input: the block of most stages.

  The RepMixer is never left out, because its shortcut is inside of it. Scopes: `RepMixer_0` and
  `ConvFFN_0`.
  """

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, C) to the same shape."""
    x = RepMixer(**self.shared(), name="RepMixer_0")(x, train)
    return self.mix_channels(x, train)


class AttentionBlock(ResidualBlock):
  """Attention over pixels and an FFN, each added to its input.

  Scopes: `RepAttention_0` and `ConvFFN_0`.

  Attributes:
    head_features: number of channels of each head of attention.
  """

  head_features: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, C) to the same shape."""
    attention = RepAttention(self.head_features, **self.shared(), name="RepAttention_0")
    x = x + self.dropped(attention(x, train), train)
    return self.mix_channels(x, train)


class Downsample(Block):
  """A 7x7 convolution at stride 2 with one group for each input channel, and a pointwise block.

  Scopes: `RepConv_large`, with the branches conv7x7 and conv3x3, and `pointwise`, a `RepVGGBlock`.

  Attributes:
    features: number of output channels, a multiple of the input's.
  """

  features: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, C) to (N, H/2, W/2, features)."""
    large = {"branches": ("conv7x7", "conv3x3"), "strides": 2, "groups": x.shape[-1]}
    x = RepConv(self.features, **large, **self.shared(), name="RepConv_large")(x, train)
    plain: dict[str, Any] = {"striding": _KEEPS, "groups": 1, "se": None, "se_reduction": 1}
    plain |= {"branches": block_branches(1, 1), "act": self.act, **self.shared()}
    return RepVGGBlock(features=self.features, **plain, name="pointwise")(x, train)


class FastViT(Classifier, kw_only=True):
  """A stem, stages of mixers, a last depthwise convolution, a global mean, and a linear classifier.

  Scopes: `stem` with `block0` to `block2`, `stage1`, `stage2`, ... with `block0`, `block1`, ...,
  `final`, and `head`. Each stage but the first begins with `downsample`. A stage with attention has
  `SkipConv_positions` before its blocks. Blocks of the stem and `final` are `RepVGGBlock`s.

  Images are at least as high and wide as the total stride, 32 with four stages; odd sizes are
  rounded up. The variants are made for 256 pixels. With `features_only` the maps are the outputs of
  the stages, "stage1" (N, H/4, W/4, C1), "stage2" (N, H/8, W/8, C2), and so on. `final` belongs to
  the classifier then. There is no `output_stride`: attention and large kernels would see different
  surroundings on a larger map.

  Attributes besides those of `Classifier`:
    stage_sizes: number of blocks in each stage.
    widths: number of channels of each stage, each a multiple of the one before.
    expansion: ratio of the width of an FFN's hidden layer to its input's.
    attention_stages: number of stages, counted from the last, whose token mixer is attention.
    head_features: number of channels of each head of attention.
    drop_path: probability with which training leaves out attention and FFN of the last block, for
      each image by itself. It grows linearly over the blocks of all stages, from 0 in the first.
    act: activation; "gelu" is the exact function.
  """

  stage_sizes: Sequence[int]
  widths: Sequence[int]
  expansion: int = 4
  attention_stages: int = 0
  head_features: int = 32
  drop_path: float = 0.0
  act: str = "gelu"

  def __post_init__(self):
    check_stages(self.stage_sizes, widths=self.widths)
    check_number("expansion", self.expansion)
    check_number("head_features", self.head_features)
    check_rate("drop_path", self.drop_path)
    stages, of_attention = len(self.stage_sizes), self.attention_stages
    if isinstance(of_attention, bool) or of_attention not in range(stages + 1):
      raise InputError(
        f"attention_stages is a number from 0 to {stages}, the number of stages, got "
        f"{of_attention!r}"
      )
    if any(after % before for before, after in zip(self.widths, self.widths[1:])):
      raise InputError(
        f"each of widths is a multiple of the one before it, for the groups of the convolution "
        f"between them, got {self.widths!r}"
      )
    if any(width % self.head_features for width in self.widths[stages - of_attention :]):
      raise InputError(
        f"widths of stages with attention are multiples of head_features, got {self.widths!r} and "
        f"{self.head_features}"
      )
    if LAST_EXPANSION * self.widths[-1] < SE_REDUCTION:
      raise InputError(
        f"the last of widths is at least {SE_REDUCTION // LAST_EXPANSION}, for "
        f"squeeze-and-excitation, got {self.widths!r}"
      )
    super().__post_init__()

  @property
  def image_size(self) -> int:
    """The side in pixels of the square images that the variants are made for."""
    return 256

  @nn.nowrap
  def total_stride(self) -> int:
    """Returns the ratio of the size of the image to the size of the last map."""
    return 2 * 2 ** len(self.stage_sizes)

  @nn.nowrap
  def maps(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
    """Runs the stem and the stages, and returns the output of each stage."""
    x = Stage(list(self.stem_blocks()), name="stem")(x, train)
    maps, stages, before = {}, len(self.stage_sizes), 0
    for number, (size, features) in enumerate(zip(self.stage_sizes, self.widths), 1):
      attends = number > stages - self.attention_stages
      down = functools.partial(self.builder(Downsample), features=features, name="downsample")
      positions = functools.partial(self.layer(SkipConv), name="SkipConv_positions")
      builders = [down] * (number > 1) + [positions] * attends
      blocks = [self.block(attends, before + index) for index in range(size)]
      before += size
      first = functools.partial(run, builders) if builders else None
      x = maps[f"stage{number}"] = Stage(blocks, first, name=f"stage{number}")(x, train)
    return maps

  @nn.nowrap
  def classify(self, maps: Mapping[str, jax.Array], train: bool) -> Any:
    """Returns logits (N, num_classes): last convolution, mean, dropout, fully connected layer."""
    x = last_of(maps)
    features, groups = LAST_EXPANSION * x.shape[-1], x.shape[-1]
    block = functools.partial(self.plain_block(3, _KEEPS, features, groups), name="final")
    final = functools.partial(block, se="pre", se_reduction=SE_REDUCTION)
    return super().classify({"final": final()(x, train)}, train)

  @nn.nowrap
  def stem_blocks(self) -> Iterator[BlockBuilder]:
    """Yields the builders of the stem: a full, a depthwise and a pointwise convolution."""
    width = self.widths[0]
    yield self.plain_block(3, _HALVES, width, 1)
    yield self.plain_block(3, _HALVES, width, width)
    yield self.plain_block(1, _KEEPS, width, 1)

  @nn.nowrap
  def plain_block(self, size: int, striding: Striding, features: int, groups: int) -> BlockBuilder:
    """Returns the builder of a block with the branches of MobileOne and without a gate."""
    own = {"features": features, "striding": striding, "groups": groups}
    branches = block_branches(size, 1)
    block = self.builder(RepVGGBlock)
    return functools.partial(block, branches=branches, se=None, se_reduction=1, **own)

  @nn.nowrap
  def block(self, attends: bool, number: int) -> BlockBuilder:
    """Returns the builder of a block of a stage.

    Args:
      attends: the block mixes pixels by attention.
      number: number of the blocks before it, in all stages.
    """
    last = max(1, sum(self.stage_sizes) - 1)
    own = {"expansion": self.expansion, "drop_path": self.drop_path * number / last}
    if not attends:
      return functools.partial(self.builder(MixerBlock), **own)
    return functools.partial(self.builder(AttentionBlock), head_features=self.head_features, **own)

  @nn.nowrap
  def layer(self, layer: type[nn.Module]) -> BlockBuilder:
    """Returns the builder of a layer that is no block, and has no activation."""
    shared = self.shared()
    del shared["act"]
    return functools.partial(layer, **shared)


_12 = {"stage_sizes": (2, 2, 6, 2), "widths": (64, 128, 256, 512)}
_36 = {"stage_sizes": (6, 6, 18, 6), "attention_stages": 1}

VARIANTS: dict[str, dict[str, Any]] = {
  "fastvit_t8": {"stage_sizes": (2, 2, 4, 2), "widths": (48, 96, 192, 384), "expansion": 3},
  "fastvit_t12": _12 | {"expansion": 3},
  "fastvit_s12": _12,
  "fastvit_sa12": _12 | {"attention_stages": 1},
  "fastvit_sa24": _12 | {"stage_sizes": (4, 4, 12, 4), "attention_stages": 1},
  "fastvit_sa36": _12 | _36,
  "fastvit_ma36": _36 | {"widths": (76, 152, 304, 608)},
}
