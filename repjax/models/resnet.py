"""ResNet: every convolution and the batch norm behind it are a RepConv of one branch.

Deploy form: convolutions with bias, activations, sums with shortcuts and the one max-pool. It holds
no batch norm and no statistics. A bottleneck's stride is on its 3x3, as in torchvision and timm.

References:
  He et al., Deep Residual Learning for Image Recognition, CVPR 2016, Table 1.
    https://arxiv.org/abs/1512.03385
  Yu et al., Dilated Residual Networks, CVPR 2017, section 2, for `output_stride`.
    https://arxiv.org/abs/1705.09914
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.errors import InputError, unknown
from repjax.layers import activation, linear
from repjax.layers.base import refuse_training
from repjax.models.base import Settings, dilate
from repjax.models.checks import check_classifier, check_images, check_number, check_whole


class Place(NamedTuple):
  """Where a block stands, and what follows from that.

  Attributes:
    stage: its number, 1 to 4; papers on detection call these stages c2 to c5.
    number: of the block in its stage, from 0.
    features: output channels.
    strides: 2 where the block halves the map.
    dilation_before: of convolutions up to the one that has the stride.
    dilation: of convolutions behind it.
  """

  stage: int
  number: int
  features: int
  strides: int
  dilation_before: int
  dilation: int


def shortcut(x: jax.Array, place: Place, settings: Settings, train: bool) -> jax.Array:
  """A block's input, through a 1x1 conv-BN where a stage begins with another shape.

  A stage that dilates instead of striding has it too, so that parameters stay the same.
  """
  if x.shape[-1] == place.features and (place.number > 0 or place.stage == 1):
    return x
  return settings.conv_bn("shortcut", place.features, 1, place.strides)(x, train)


class BasicBlock(nn.Module):
  """3x3, 3x3, sum with the shortcut, activation. Scopes: `RepConv_conv1`, ..., `_shortcut`."""

  place: Place
  settings: Settings

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    place, conv_bn, act = self.place, self.settings.conv_bn, activation(self.settings.act)
    y = conv_bn("conv1", place.features, 3, place.strides, place.dilation_before)(x, train)
    y = conv_bn("conv2", place.features, 3, dilation=place.dilation)(act(y), train)
    return act(y + shortcut(x, place, self.settings, train))


class Bottleneck(nn.Module):
  """1x1 to a quarter of the features, 3x3, 1x1, sum with the shortcut, activation."""

  place: Place
  settings: Settings

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    place, conv_bn, act = self.place, self.settings.conv_bn, activation(self.settings.act)
    inner = place.features // 4
    y = conv_bn("conv1", inner, 1)(x, train)
    y = conv_bn("conv2", inner, 3, place.strides, place.dilation_before)(act(y), train)
    y = conv_bn("conv3", place.features, 1)(act(y), train)
    return act(y + shortcut(x, place, self.settings, train))


BLOCKS: dict[str, type[nn.Module]] = {"basic": BasicBlock, "bottleneck": Bottleneck}
"""Name to class, built as `block(place, settings, name=...)` and called with (x, train)."""


class _Stem(nn.Module):
  """7x7 at stride 2, activation, 3x3 max-pool at stride 2."""

  features: int
  settings: Settings

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = self.settings.conv_bn("0", self.features, 7, strides=2)(x, train)
    x = activation(self.settings.act)(x)
    padding: Any = ((1, 1), (1, 1))  # Linen's annotation knows only names
    return nn.max_pool(x, (3, 3), (2, 2), padding)  # (N, H/4, W/4, C)


class _Stage(nn.Module):
  """The blocks of one stage, called `block0`, `block1`, ... in its scope."""

  places: Sequence[Place]
  build: Callable[[Place], nn.Module]

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    for place in self.places:
      x = self.build(place)(x, train)
    return x


class ResNet(nn.Module):
  """7x7 stem, four stages of residual blocks, global mean, linear classifier.

  Scopes: `stem`, `stage1` ... `stage4` with `block0`, `block1`, ..., `head`. Another family takes
  over the network and puts blocks of its own in some places: it is a subclass with another
  `block_at`, and its attributes become overrides of its models.

  Attributes:
    stage_sizes: blocks in each of the four stages.
    widths: output channels of each stage.
    block: "basic" or "bottleneck".
    stem_features: output channels of the stem.
    output_stride: how many times the last stage's map is smaller than the image: 32, or 16 or 8,
      where the last stages dilate instead of striding. Parameters are the same, and so is what the
      maps hold at every second or fourth pixel.
    num_classes: outputs.
    act: "relu", "silu" or "gelu".
    dropout: rate in front of the classifier.
    remat: recompute each block in the backward pass instead of keeping what is in it.
    axis_name: of the pmapped axis over which batch norms share statistics; None: per device.
    features_only: return the outputs of the stages instead of logits, and build no classifier.
    deploy: build the deploy form.
    dtype: of the computation and the result.
    param_dtype: of the parameters.
  """

  stage_sizes: Sequence[int] = (3, 4, 6, 3)
  widths: Sequence[int] = (256, 512, 1024, 2048)
  block: str = "bottleneck"
  stem_features: int = 64
  output_stride: int = 32
  num_classes: int = 1000
  act: str = "relu"
  dropout: float = 0.0
  remat: bool = False
  axis_name: str | None = None
  features_only: bool = False
  deploy: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

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
    if self.output_stride not in (8, 16, 32):
      raise InputError(f"output_stride is 32, 16 or 8, got {self.output_stride!r}")
    check_classifier(self.num_classes, self.dropout, self.act)
    super().__post_init__()

  def block_at(self, place: Place) -> tuple[type[nn.Module], dict[str, Any]]:
    """The class of the block at a place, and its attributes besides `place` and `settings`."""
    del place
    return BLOCKS[self.block], {}

  def check_images(self, images: jax.Array) -> None:
    """Raises InputError for images that the network cannot take."""
    check_images("ResNet", images, self.output_stride)

  def stages(self) -> Iterator[tuple[str, tuple[Place, ...]]]:
    """The stages' names and the places in them, in order."""
    _, *steps = dilate((4, 1, 2, 2, 2), self.output_stride)  # the stem first
    rows = zip(self.stage_sizes, self.widths, steps)
    for stage, (size, features, step) in enumerate(rows, 1):
      first = Place(stage, 0, features, *step)
      later = (Place(stage, i, features, *step.later) for i in range(1, size))
      yield f"stage{stage}", (first, *later)

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> Any:
    """Classifies images.

    Args:
      images: (N, H, W, 3), normalised; H and W at least `output_stride`. Odd sizes are
        rounded up.
      train: use and update batch statistics, apply dropout.

    Returns:
      Logits (N, num_classes). With `features_only`: {"stage1": (N, H/4, W/4, C1), ...,
      "stage4": (N, H/32, W/32, C4)}, the last ones larger with a smaller `output_stride`.

    Raises:
      ValueError: images smaller than `output_stride`, or `train` in deploy form.
    """
    refuse_training(self.deploy, train)
    self.check_images(images)
    settings = Settings.of(self)

    def build(place: Place) -> nn.Module:
      block, attributes = self.block_at(place)
      block = nn.remat(block, static_argnums=(2,)) if self.remat else block
      own: dict[str, Any] = {"place": place, "settings": settings, **attributes}
      return block(**own, name=f"block{place.number}")

    x = _Stem(self.stem_features, settings, name="stem")(images.astype(self.dtype), train)
    features = {}
    for name, places in self.stages():
      x = features[name] = _Stage(places, build, name=name)(x, train)
    if self.features_only:
      return features
    x = x.mean((1, 2))  # (N, C)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    return linear(x, self.num_classes, name="head", **dtypes)


_BASIC = {"block": "basic", "widths": (64, 128, 256, 512)}
_BOTTLENECK = {"block": "bottleneck", "widths": (256, 512, 1024, 2048)}

VARIANTS: dict[str, dict[str, Any]] = {
  "resnet18": _BASIC | {"stage_sizes": (2, 2, 2, 2)},
  "resnet34": _BASIC | {"stage_sizes": (3, 4, 6, 3)},
  "resnet50": _BOTTLENECK | {"stage_sizes": (3, 4, 6, 3)},
  "resnet101": _BOTTLENECK | {"stage_sizes": (3, 4, 23, 3)},
  "resnet152": _BOTTLENECK | {"stage_sizes": (3, 8, 36, 3)},
}
