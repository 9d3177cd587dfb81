"""ParNet, twelve layers deep: three streams of blocks side by side, fused at the end.

Training form: a stream block is act(BN(conv3x3(x)) + BN(conv1x1(x)) + z * g(z)) with z = BN(x). A
down-sampling block is act([BN(conv3x3(x)) + BN(conv1x1(pool(x)))] * 2 g(x)); a fusion block is the
same over the channels of two maps, each behind a norm, in turn, with two groups and a shuffle of
channels at its end. g is a sigmoid of one fully connected layer over the means of all channels.

Deploy form, exactly:
- a stream block is act(conv3x3(x) + affine(x) * g(x)): one convolution with bias, a scale and a
  shift for each channel, and the gate's fully connected layer, which has a bias now;
- a down-sampling block is act(conv3x3(x) * 2 g(x)): one convolution with bias at stride 2, and the
  gate's layer as it was. The pool is in the convolution;
- a fusion block is the same over affine(a) and affine(b), a scale and a shift for each channel of
  either map, and keeps the order of channels: they are read in turn and shuffled at the end;
- the classifier.
No norm and no statistics remain, where the authors' conversion keeps the norms of gates and of
fusion. Gates stay because they multiply by numbers computed from the image. The affine maps of
fusion stay because the convolution behind them pads with zeros after the norm: with the shift in
its bias, pixels at the border would differ. The shuffles stay because they are cheap, and a layer's
channels are then those of the training form.

Gates run beside convolutions, so the longest path has 12 layers: `repjax.analysis.depth` counts it.

References:
  Goyal et al., Non-deep Networks, NeurIPS 2022, section 3. https://arxiv.org/abs/2110.07641
  https://github.com/imankgoyal/NonDeepNetworks at 777b286, imagenet, for widths and sizes
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.errors import InputError, unknown
from repjax.layers import GlobalGate, RepConv, RepNorm, SkipSqueezeExcite, activation, linear
from repjax.layers.base import refuse_training
from repjax.models.base import Part, Settings
from repjax.models.checks import check_classifier, check_images, check_whole

GROUPS = 2  # of fusion, which reads two maps


def channel_shuffle(x: jax.Array, groups: int) -> jax.Array:
  """Takes one channel of each group in turn: with two, channels 0 to 7 become 0 4 1 5 2 6 3 7."""
  grouped = x.reshape(*x.shape[:-1], groups, -1)  # (N, H, W, g, C/g)
  return grouped.swapaxes(-1, -2).reshape(x.shape)


def gated_conv(
  x: jax.Array, features: int, strides: int, groups: int, settings: Settings, train: bool
) -> jax.Array:
  """RepConv times gate, activation; for compact methods. Scopes: `RepConv_0` and `gate`."""
  dtypes = {"dtype": settings.dtype, "param_dtype": settings.param_dtype}
  small = "conv1x1" if strides == 1 else "avg2x2_conv1x1"
  layer = RepConv(
    features,
    branches=("conv3x3", small),
    strides=strides,
    groups=groups,
    **settings.of_layers(),
    name="RepConv_0",
  )
  gate = GlobalGate(features, groups, **dtypes, name="gate")
  return activation(settings.act)(layer(x, train) * gate(x))


class StreamBlock(nn.Module):
  """RepConv plus gated shortcut, activation; the shape stays. The paper's RepVGG-SSE block."""

  settings: Settings

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    shared = self.settings.of_layers()
    layer = RepConv(x.shape[-1], branches=("conv3x3", "conv1x1"), **shared, name="RepConv_0")
    shortcut = SkipSqueezeExcite(**shared, name="SkipSqueezeExcite_0")
    return activation(self.settings.act)(layer(x, train) + shortcut(x, train))


class Downsample(nn.Module):
  """RepConv times gate, activation: to other channels, and at stride 2 to half the size."""

  features: int
  settings: Settings
  strides: int = 2

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    return gated_conv(x, self.features, self.strides, 1, self.settings, train)


class Pointwise(nn.Module):
  """1x1 conv-BN, activation."""

  features: int
  settings: Settings

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = self.settings.conv_bn("0", self.features, 1)(x, train)
    return activation(self.settings.act)(x)


class Fusion(nn.Module):
  """The channels of two normed maps in turn, grouped RepConv times grouped gate, shuffle.

  Scopes: `RepNorm_stream`, `RepNorm_previous`, `RepConv_0`, `gate`.
  """

  features: int
  settings: Settings
  strides: int

  @nn.compact
  def __call__(self, stream: jax.Array, previous: jax.Array, train: bool) -> jax.Array:
    shared = self.settings.of_layers()
    stream = RepNorm(**shared, name="RepNorm_stream")(stream, train)
    previous = RepNorm(**shared, name="RepNorm_previous")(previous, train)
    x = channel_shuffle(jnp.concatenate([stream, previous], -1), 2)  # (N, H, W, 2 C)
    x = gated_conv(x, self.features, self.strides, GROUPS, self.settings, train)
    return channel_shuffle(x, GROUPS)


LAST_BLOCKS: dict[str, type[nn.Module]] = {"downsample": Downsample, "conv1x1": Pointwise}
"""Name to class of the block in front of the classifier, built as `block(features, settings)`."""


class _Stream(nn.Module):
  """Blocks called `block0`, `block1`, ... in the stream's scope."""

  size: int
  settings: Settings
  remat: bool

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    block = nn.remat(StreamBlock, static_argnums=(2,)) if self.remat else StreamBlock
    for index in range(self.size):
      x = block(settings=self.settings, name=f"block{index}")(x, train)
    return x


class ParNet(nn.Module):
  """Three streams at three resolutions, fused from the largest map to the smallest.

  Scopes, in the order in which a map passes through them: `downsample0` and `downsample1`, `stem`
  if it has blocks, `downsample2`, `downsample3`; `stream1`, `stream2` and `stream3`, which read the
  outputs of `downsample1` (or `stem`), `downsample2` and `downsample3`; `fusion1` takes stream 1 to
  the size of stream 2, `fusion2` both of these to that of stream 3, `fusion3` all; `downsample4`,
  `head`. Streams have `block0`, `block1`, ... The table `streams` says so, and is what runs. Images
  of every size from the total stride up are taken; the authors' training form takes multiples of
  it.

  There is no code for CIFAR. The author says (issue 11 of the repository above): the first two
  down-sampling blocks become stream blocks, the last one a narrower 1x1 convolution, each stream
  loses a block and one is added at depth 3; images of 32 px, other widths. The variants
  `parnet_cifar_*` are made so, and these are choices of ours, so that no number of the paper is
  claimed for them:

  - `downsample0`, which widens the image, cannot have a shortcut: it is a gated block at stride 1;
  - the block at depth 3 is a stream block in front of all streams (`stem`): depth stays 12;
  - the widths, (p, 2 p, 4 p, 8 p) with p = 48, 96 and 160.

  Attributes:
    stage_sizes: blocks in each of the three streams.
    widths: channels of the three streams and of what the classifier reads.
    strides: of `downsample0` and `downsample1`; one that keeps the shape is a stream block. The
      first has at most 64 channels if the second is not one.
    stem_blocks: stream blocks behind these two.
    last_block: "downsample", or "conv1x1" at stride 1.
    num_classes: outputs.
    act: "relu", "silu" or "gelu". The paper's is silu; the released weights were made with relu.
    dropout: rate in front of the classifier.
    remat: recompute each block in the backward pass instead of keeping what is in it.
    axis_name: of the pmapped axis over which batch norms share statistics; None: per device.
    features_only: return feature maps instead of logits, and build no classifier.
    deploy: build the deploy form.
    dtype: of the computation and the result.
    param_dtype: of the parameters.
  """

  stage_sizes: Sequence[int] = (4, 5, 5)
  widths: Sequence[int] = (92, 192, 384, 1280)
  strides: Sequence[int] = (2, 2)
  stem_blocks: int = 0
  last_block: str = "downsample"
  num_classes: int = 1000
  act: str = "silu"
  dropout: float = 0.0
  remat: bool = False
  axis_name: str | None = None
  features_only: bool = False
  deploy: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self):
    check_whole("stage_sizes", self.stage_sizes, 3, ", one for each stream")
    check_whole("widths", self.widths, 4, ": of three streams and of what the classifier reads")
    if self.widths[2] % GROUPS:
      raise InputError(
        f"the third of widths is a multiple of {GROUPS}, the groups of fusion, got {self.widths!r}"
      )
    check_whole("strides", self.strides, 2, ", each 1 or 2")
    if max(self.strides) > 2:
      raise InputError(f"strides takes 2 whole numbers, each 1 or 2, got {self.strides!r}")
    if type(self.stem_blocks) is not int or self.stem_blocks < 0:
      raise InputError(f"stem_blocks takes a whole number, 0 or more, got {self.stem_blocks!r}")
    if self.last_block not in LAST_BLOCKS:
      raise unknown("last_block of a ParNet", self.last_block, LAST_BLOCKS)
    check_classifier(self.num_classes, self.dropout, self.act)
    super().__post_init__()

  @property
  def image_size(self) -> int:
    """The side in pixels of the images that the variants are made for; others are taken too."""
    return 32 if math.prod(self.strides) == 1 else 224

  def total_stride(self) -> int:
    """How many times the last map is smaller than the image."""
    return math.prod(self.strides) * (8 if self.last_block == "downsample" else 4)

  @property
  def streams(self) -> dict[str, Part]:
    """The scopes, in an order in which they can run."""
    stem = "stem" if self.stem_blocks else "downsample1"
    parts = {
      "downsample0": Part(1, ("images",)),
      "downsample1": Part(1, ("downsample0",)),
      "stem": Part(1, ("downsample1",)),
      "downsample2": Part(2, (stem,)),
      "downsample3": Part(3, ("downsample2",)),
      "stream1": Part(1, (stem,)),
      "stream2": Part(2, ("downsample2",)),
      "stream3": Part(3, ("downsample3",)),
      "fusion1": Part(1, ("stream1",)),
      "fusion2": Part(2, ("stream2", "fusion1")),
      "fusion3": Part(3, ("stream3", "fusion2")),
      "downsample4": Part(3, ("fusion3",)),
      "head": Part(3, ("downsample4",)),
    }
    left_out = ("stem",) * (not self.stem_blocks) + ("head",) * self.features_only
    return {scope: part for scope, part in parts.items() if scope not in left_out}

  @property
  def outputs(self) -> Any:
    """The result, with scopes in the place of their maps."""
    if not self.features_only:
      return "head"
    return {"stage1": "stream1", "stage2": "stream2", "stage3": "fusion3", "stage4": "downsample4"}

  def __call__(self, images: jax.Array, train: bool = False) -> Any:
    """Classifies images.

    Args:
      images: (N, H, W, 3), normalised; H and W at least `total_stride`. Odd sizes are rounded up.
      train: use and update batch statistics, apply dropout.

    Returns:
      Logits (N, num_classes). With `features_only`: {"stage1": (N, H/4, W/4, C1), "stage2":
      (N, H/8, W/8, C2), "stage3": (N, H/16, W/16, C3), "stage4": (N, H/32, W/32, C4)}, which are
      the outputs of the first two streams, of the last fusion, which has seen all three, and what
      the classifier reads. With other `strides` maps are larger.

    Raises:
      ValueError: images smaller than the total stride, or `train` in deploy form.
    """
    refuse_training(self.deploy, train)
    check_images("ParNet", images, self.total_stride())
    maps = self.run({"images": images.astype(self.dtype)}, self.streams, train)
    return jax.tree.map(lambda scope: maps[scope], self.outputs)

  def run(
    self, maps: Mapping[str, jax.Array], scopes: Iterable[str], train: bool = False
  ) -> dict[str, jax.Array]:
    """Runs some scopes of the network.

    Args:
      maps: what they read, by scope; "images" in the network's dtype.
      scopes: in the order of `streams`.
      train: as in a call.

    Returns:
      The maps, with one more for each scope.
    """
    maps, parts = dict(maps), self.streams
    for scope in scopes:
      maps[scope] = self._part(scope, *(maps[name] for name in parts[scope].reads), train=train)
    return maps

  @nn.compact
  def _part(self, scope: str, *maps: jax.Array, train: bool) -> jax.Array:
    """What one scope makes of one map or two."""
    settings, (one, two, three) = Settings.of(self), self.stage_sizes
    sizes = {"stem": self.stem_blocks, "stream1": one, "stream2": two, "stream3": three}
    if scope in sizes:
      return _Stream(sizes[scope], settings, self.remat, name=scope)(maps[0], train)
    if scope == "head":
      x = nn.Dropout(self.dropout, deterministic=not train)(maps[0].mean((1, 2)))  # (N, C)
      dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
      return linear(x, self.num_classes, name=scope, **dtypes)
    block, attributes = self._block(scope, maps[0].shape[-1])
    block = nn.remat(block, static_argnums=(len(maps) + 1,)) if self.remat else block
    return block(settings=settings, name=scope, **attributes)(*maps, train)

  def _block(self, scope: str, channels: int) -> tuple[type[nn.Module], dict[str, Any]]:
    """The class and the attributes of a block that reads so many channels."""
    first, second, third, last = self.widths
    narrow = min(64, first) if self.strides[1] == 2 else first
    leading = {"downsample0": (narrow, self.strides[0]), "downsample1": (first, self.strides[1])}
    if scope in leading:
      features, strides = leading[scope]
      if (features, strides) == (channels, 1):
        return StreamBlock, {}
      return Downsample, {"features": features, "strides": strides}
    return {
      "downsample2": (Downsample, {"features": second}),
      "downsample3": (Downsample, {"features": third}),
      "fusion1": (Downsample, {"features": second}),
      "fusion2": (Fusion, {"features": third, "strides": 2}),
      "fusion3": (Fusion, {"features": third, "strides": 1}),
      "downsample4": (LAST_BLOCKS[self.last_block], {"features": last}),
    }[scope]


_CIFAR = {
  "stage_sizes": (3, 4, 4),
  "strides": (1, 1),
  "stem_blocks": 1,
  "last_block": "conv1x1",
}

VARIANTS: dict[str, dict[str, Any]] = {
  "parnet_s": {"widths": (92, 192, 384, 1280)},  # as released
  "parnet_s_96": {"widths": (96, 192, 384, 1280)},  # as in the paper
  "parnet_m": {"widths": (128, 256, 512, 2048)},
  "parnet_l": {"widths": (160, 320, 640, 2560), "dropout": 0.1},
  "parnet_xl": {"widths": (200, 400, 800, 3200), "dropout": 0.1},
  "parnet_cifar_s": _CIFAR | {"widths": (48, 96, 192, 384)},
  "parnet_cifar_m": _CIFAR | {"widths": (96, 192, 384, 768)},
  "parnet_cifar_l": _CIFAR | {"widths": (160, 320, 640, 1280)},
}
