"""RepViT: depthwise 3x3 token mixers and 1x1 channel mixers, arranged as in a vision transformer.

In training form a token mixer is a RepConv with the branches conv3x3, conv1x1 and skip, and a norm
after their sum. A channel mixer is a 1x1 conv-BN to twice the channels, an activation, and a 1x1
conv-BN back, added to its input. The classifier is the mean of two, each with a norm.

In deploy form a token mixer is one depthwise convolution with bias, a channel mixer is two 1x1
convolutions with bias, and the classifier is one fully connected layer. The deploy form holds no
norm and no statistics. Three things stay besides the convolutions.

- Squeeze-and-excitation, which every second block has, multiplies by numbers computed from the
  image.
- The sum of a channel mixer and its input passes around an activation, so that no convolution can
  hold it.
- The two convolutions that halve a map, depthwise 3x3 and pointwise, could be one. This one would
  need about nine times as many multiplications.

References:
  Wang et al., RepViT: Revisiting Mobile CNN From ViT Perspective, CVPR 2024, section 3.
    https://arxiv.org/abs/2307.09283
  https://github.com/THU-MIG/RepViT at 960c61b, model/repvit.py, for widths and sizes
  Yu et al., Dilated Residual Networks, CVPR 2017, section 2, for `output_stride`.
    https://arxiv.org/abs/1705.09914
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn

from repjax.errors import InputError
from repjax.layers import RepConv, RepHeads, SqueezeExcite
from repjax.layers.composition import AFTER_SUM
from repjax.models.base import Block, Classifier, Stage, last_of, run
from repjax.models.checks import check_last_strides, check_whole
from repjax.models.dilation import Striding, dilate

EXPANSION = 2
"""Ratio of the width of a channel mixer's hidden layer to its input's."""


def gate_width(features: int) -> int:
  """Returns the width of the hidden layer of a gate: a quarter, as a multiple of 8."""
  return max(8, (features // 4 + 4) // 8 * 8)


class MixerBlock(Block):
  """A block with the parts that all blocks of a RepViT share.

  Attributes:
    normed_branches: give both convolutions of a token mixer a norm, and their sum none.
  """

  normed_branches: bool

  @nn.nowrap
  def mix_tokens(self, x: jax.Array, dilation: int, train: bool) -> jax.Array:
    """Applies the token mixer, in the scope `RepConv_mixer`."""
    own: dict[str, Any] = {}
    if not self.normed_branches:
      own = {"norm": ("conv3x3", AFTER_SUM), "conv_bias": ("conv1x1",)}
    features = x.shape[-1]
    return RepConv(
      features,
      branches=("conv3x3", "conv1x1", "skip"),
      groups=features,
      dilation=dilation,
      **own,
      **self.shared(),
      name="RepConv_mixer",
    )(x, train)

  @nn.nowrap
  def mix_channels(self, x: jax.Array, train: bool) -> jax.Array:
    """Adds the channel mixer, in the scopes `RepConv_expand` and `RepConv_project`."""
    y = self.activate(self.conv_bn("expand", EXPANSION * x.shape[-1], 1)(x, train))
    return x + self.conv_bn("project", x.shape[-1], 1)(y, train)


class RepViTBlock(MixerBlock):
  """A token mixer, perhaps squeeze-and-excitation, and a channel mixer.

  Scopes: `RepConv_mixer`, `SqueezeExcite_0`, `RepConv_expand` and `RepConv_project`.

  Attributes:
    se: have squeeze-and-excitation.
    dilation: dilation of the token mixer.
  """

  se: bool
  dilation: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, C) to the same shape."""
    x = self.mix_tokens(x, self.dilation, train)
    if self.se:
      x = SqueezeExcite(hidden=gate_width(x.shape[-1]), **self.dtypes(), name="SqueezeExcite_0")(x)
    return self.mix_channels(x, train)


class Downsample(MixerBlock):
  """A block, a depthwise 3x3 at stride 2, a 1x1 to more channels, and a channel mixer.

  Scopes: `before`, which is a `RepViTBlock`, then `RepConv_spatial`, `RepConv_channel`,
  `RepConv_expand` and `RepConv_project`.

  Attributes:
    features: number of output channels.
    striding: stride and dilation of the depthwise convolution.
  """

  features: int
  striding: Striding

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, C) to (N, H / strides, W / strides, features)."""
    strides, dilation = self.striding.strides, self.striding.dilation_before
    own = {"act": self.act, "normed_branches": self.normed_branches, **self.shared()}
    x = RepViTBlock(se=False, dilation=dilation, **own, name="before")(x, train)
    x = RepConv(
      x.shape[-1],
      branches=("conv3x3",),
      strides=strides,
      groups=x.shape[-1],
      dilation=dilation,
      **self.shared(),
      name="RepConv_spatial",
    )(x, train)
    x = self.conv_bn("channel", self.features, 1)(x, train)
    return self.mix_channels(x, train)


class Stem(Block):
  """Two 3x3 convolutions at stride 2 with an activation between.

  Scopes: `RepConv_conv1` and `RepConv_conv2`.

  Attributes:
    features: number of output channels.
  """

  features: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, C) to (N, H/4, W/4, features)."""
    x = self.activate(self.conv_bn("conv1", self.features // 2, 3, strides=2)(x, train))
    return self.conv_bn("conv2", self.features, 3, strides=2)(x, train)


class Head(Block):
  """The classifier: mean over pixels, dropout, and the mean of one or two fully connected layers.

  Attributes:
    num_classes: number of outputs.
    dropout: dropout rate in front of the fully connected layers.
    heads: number of fully connected layers in training form.
  """

  num_classes: int
  dropout: float
  heads: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, C) to logits (N, num_classes)."""
    x = nn.Dropout(self.dropout, deterministic=not train)(x.mean((1, 2)))  # (N, C)
    return RepHeads(self.num_classes, self.heads, **self.shared(), name="RepHeads_0")(x, train)


class RepViT(Classifier, kw_only=True):
  """A stem, four stages of blocks, a global mean, and one or two linear classifiers.

  Scopes: `stem`, `stage1` ... `stage4` with `block0`, `block1`, ..., and `head`. Stages 2 to 4
  begin with `downsample`. Images are at least `output_stride` pixels high and wide; odd sizes are
  rounded up. With `features_only` the maps are "stage1" (N, H/4, W/4, C1) to "stage4"
  (N, H/32, W/32, C4). With a smaller `output_stride` the last maps are larger.

  Attributes besides those of `Classifier`:
    stage_sizes: number of blocks in each of the four stages, without those of `downsample`. Blocks
      0, 2, 4, ... of a stage have squeeze-and-excitation.
    widths: number of channels of each stage; the first is at least 2, for the stem.
    act: activation of stem and channel mixers; "gelu" is the exact function.
    normed_branches: give both convolutions of a token mixer a norm, and their sum none, as in the
      first version of the paper. False gives the 1x1 convolution a bias, and the sum a norm.
    distilled: train two classifiers, whose logits are averaged.
    output_stride: ratio of the size of the image to the size of the last map: 32, 16 or 8. Below 32
      the last stages dilate instead of striding. Parameters stay the same. The values of the larger
      maps differ, because squeeze-and-excitation averages over more pixels.
  """

  stage_sizes: Sequence[int]
  widths: Sequence[int]
  act: str = "gelu"
  normed_branches: bool = False
  distilled: bool = True
  output_stride: int = 32

  def __post_init__(self):
    for field in ("stage_sizes", "widths"):
      check_whole(field, getattr(self, field), 4)
    if self.widths[0] < 2:
      raise InputError(f"the first of widths is at least 2, for the stem, got {self.widths!r}")
    check_last_strides(self.output_stride)
    super().__post_init__()

  @nn.nowrap
  def total_stride(self) -> int:
    """Returns the ratio of the size of the image to the size of the last map."""
    return self.output_stride

  @nn.nowrap
  def maps(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
    """Runs the stem and the stages, and returns the output of each stage."""
    x = Stem(self.widths[0], **self.shared(), name="stem")(x, train)
    # Strides of the stem and four stages; the stem's result is dropped.
    _, *stridings = dilate((4, 1, 2, 2, 2), self.output_stride)
    maps, own = {}, {"normed_branches": self.normed_branches}
    rows = zip(self.stage_sizes, self.widths, stridings)
    for number, (size, features, striding) in enumerate(rows, 1):
      block = functools.partial(self.builder(RepViTBlock), dilation=striding.dilation, **own)
      blocks = [functools.partial(block, se=index % 2 == 0) for index in range(size)]
      down = functools.partial(
        self.builder(Downsample), features=features, striding=striding, name="downsample", **own
      )
      first = functools.partial(run, [down]) if number > 1 else None
      name = f"stage{number}"
      x = maps[name] = Stage(blocks, first, name=name)(x, train)
    return maps

  @nn.nowrap
  def classify(self, maps: Mapping[str, jax.Array], train: bool) -> jax.Array:
    """Returns logits (N, num_classes), the mean of those of all classifiers."""
    heads = 2 if self.distilled else 1
    head = Head(self.num_classes, self.dropout, heads, **self.shared(), name="head")
    return head(last_of(maps), train)


_A = {"stage_sizes": (2, 2, 14, 2)}
_B = {"stage_sizes": (2, 2, 12, 2), "widths": (64, 128, 256, 512)}

VARIANTS: dict[str, dict[str, Any]] = {
  "repvit_m0_9": _A | {"widths": (48, 96, 192, 384)},
  "repvit_m1_0": _A | {"widths": (56, 112, 224, 448)},
  "repvit_m1_1": _B,
  "repvit_m1_5": _B | {"stage_sizes": (4, 4, 24, 4)},
  "repvit_m2_3": {"stage_sizes": (6, 6, 34, 2), "widths": (80, 160, 320, 640)},
  # The first version of the paper.
  "repvit_m1": _A | {"widths": (48, 96, 192, 384), "normed_branches": True},
  "repvit_m2": _B | {"normed_branches": True},
  "repvit_m3": _B | {"stage_sizes": (4, 4, 18, 2), "normed_branches": True},
}
