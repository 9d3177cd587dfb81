"""ParNet, twelve layers deep: three streams of blocks side by side, fused at the end.

In training form, z = BN(x) and g is a sigmoid of one fully connected layer over the means of all
channels. In a fusion block, g reads the means of its own group of channels alone. There are three
kinds of blocks.

- A stream block is act(BN(conv3x3(x)) + BN(conv1x1(x)) + z * g(z)).
- A down-sampling block is act([BN(conv3x3(x)) + BN(conv1x1(pool(x)))] * 2 g(x)), at stride 2. At
  stride 1 there is no pool.
- A fusion block is a down-sampling block over two maps. Each map passes through a norm. The
  channels of the two are read in turn. Convolutions and gate have two groups, and a shuffle of
  channels ends the block. `fusion2` has stride 2, and `fusion3` has stride 1.

The deploy form computes what the training form computes in evaluation, up to rounding.

- A stream block is act(conv3x3(x) + affine(x) * g(x)). It holds one convolution with bias, a scale
  and a shift for each channel, and the fully connected layer of the gate, which now has a bias.
- A down-sampling block is act(conv3x3(x) * 2 g(x)). It holds one convolution with bias, at the same
  stride, and the layer of the gate unchanged. At stride 2 the pool is folded into the convolution.
- A fusion block is a down-sampling block over affine(a) and affine(b): a scale and a shift for each
  channel of both maps.

No norm and no statistics remain. The conversion of the authors keeps the norms of gates and of
fusion. Three things stay, each for its own reason.

- Gates multiply by numbers computed from the image.
- The affine maps of fusion come before a convolution that pads with zeros. If the convolution's
  bias held the shift, pixels at the border would differ.
- Shuffles are cheap, and with them a layer's channels are those of the training form.

Gates run beside convolutions, so that the longest path has 12 layers, as `repjax.analysis.depth`
counts.

References:
  Goyal et al., Non-deep Networks, NeurIPS 2022, section 3. https://arxiv.org/abs/2110.07641
  https://github.com/imankgoyal/NonDeepNetworks at 777b286, imagenet, for widths and sizes
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.errors import InputError, unknown
from repjax.layers import GlobalGate, RepConv, RepNorm, SkipSqueezeExcite
from repjax.models.base import Block, BlockBuilder, Classifier, Stage, StreamScope
from repjax.models.checks import check_whole

GROUPS = 2
"""Number of groups of a fusion block. Each group reads half of the channels of each map."""


def channel_shuffle(x: jax.Array, groups: int) -> jax.Array:
  """Takes one channel of each group in turn: with two, channels 0 to 7 become 0 4 1 5 2 6 3 7."""
  grouped = x.reshape(*x.shape[:-1], groups, -1)  # (N, H, W, g, C/g)
  return grouped.swapaxes(-1, -2).reshape(x.shape)


class StreamBlock(Block):
  """A RepConv plus a gated shortcut, and an activation; the paper calls it RepVGG-SSE block.

  Scopes: `RepConv_0` and `SkipSqueezeExcite_0`.
  """

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, C) to the same shape."""
    shared = self.shared()
    conv = RepConv(x.shape[-1], branches=("conv3x3", "conv1x1"), **shared, name="RepConv_0")
    shortcut = SkipSqueezeExcite(**shared, name="SkipSqueezeExcite_0")
    return self.activate(conv(x, train) + shortcut(x, train))


class GatedBlock(Block):
  """A block whose RepConv is multiplied by a gate; the base of `Downsample` and `Fusion`.

  Attributes:
    features: number of output channels.
    strides: 1 or 2.
  """

  features: int
  strides: int = 2

  @nn.nowrap
  def gated_conv(self, x: jax.Array, groups: int, train: bool) -> jax.Array:
    """Returns act(RepConv(x) * gate(x)), from the scopes `RepConv_0` and `gate`."""
    # At stride 2 the 1x1 branch reads the means of 2x2 windows, not every second pixel.
    small = "conv1x1" if self.strides == 1 else "avg2x2_conv1x1"
    conv = RepConv(
      self.features,
      branches=("conv3x3", small),
      strides=self.strides,
      groups=groups,
      **self.shared(),
      name="RepConv_0",
    )
    gate = GlobalGate(self.features, groups, **self.dtypes(), name="gate")
    return self.activate(conv(x, train) * gate(x))


class Downsample(GatedBlock):
  """A RepConv times a gate, and an activation: the down-sampling block.

  At stride 2 the map gets half as large. At stride 1 the block keeps the size and changes only the
  number of channels, as at the start of the networks for CIFAR.
  """

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, C) to (N, H / strides, W / strides, features)."""
    return self.gated_conv(x, 1, train)


class Fusion(GatedBlock):
  """A join of two maps by grouped, gated convolutions, at stride 1 or 2.

  Scopes: `RepNorm_stream`, `RepNorm_previous`, `RepConv_0` and `gate`.
  """

  @nn.compact
  def __call__(self, stream: jax.Array, previous: jax.Array, train: bool) -> jax.Array:
    """Maps the outputs of a stream and of the fusion before, (N, H, W, C) each, to one map.

    The result is (N, H / strides, W / strides, features).
    """
    shared = self.shared()
    stream = RepNorm(**shared, name="RepNorm_stream")(stream, train)
    previous = RepNorm(**shared, name="RepNorm_previous")(previous, train)
    # The shuffle pairs channel c of one map with channel c of the other. A group of convolutions
    # then reads half of the channels of each map, and not one of the maps.
    x = channel_shuffle(jnp.concatenate([stream, previous], -1), 2)  # (N, H, W, 2 C)
    x = self.gated_conv(x, GROUPS, train)
    # The output is shuffled as well, so that the next groups read channels of both groups.
    return channel_shuffle(x, GROUPS)


class Pointwise(Block):
  """A 1x1 conv-BN and an activation.

  Attributes:
    features: number of output channels.
  """

  features: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, C) to (N, H, W, features)."""
    return self.activate(self.conv_bn("0", self.features, 1)(x, train))


LAST_BLOCKS: dict[str, type[Block]] = {"downsample": Downsample, "conv1x1": Pointwise}
"""Name to class of the block in front of the classifier; the class takes `features`."""


class ParNet(Classifier, kw_only=True):
  """Three streams at three resolutions, fused from the largest map to the smallest.

  `maps` is the forward pass, from top to bottom. Each line runs one scope.

  - `downsample0`, `downsample1`, and `stem` if it has blocks, run first. On several devices they
    belong to the device of stream 1.
  - `downsample2` and `downsample3` each halve the map.
  - `stream1`, `stream2` and `stream3`, with `block0`, `block1`, ..., read the three maps.
  - `fusion1` takes stream 1 to the size of stream 2. It reads one map, so it is a `Downsample`.
  - `fusion2` and `fusion3` are `Fusion` blocks. `fusion2` takes stream 2 and the result of
    `fusion1` to the size of stream 3. `fusion3` joins stream 3 and the result of `fusion2`.
  - `downsample4` and `head` end the network.

  Images are at least `total_stride` pixels high and wide; odd sizes are rounded up. The training
  form of the authors takes multiples of the total stride alone. With `features_only` there are four
  maps, which are larger with smaller `strides`.

  - "stage1" (N, H/4, W/4, C1) and "stage2" (N, H/8, W/8, C2) are the outputs of the first two
    streams.
  - "stage3" (N, H/16, W/16, C3) is the output of the last fusion, which has seen all streams.
  - "stage4" (N, H/32, W/32, C4) is the map that the classifier reads.

  There is no code of the authors for CIFAR. In issue 11 of their repository an author describes the
  changes. The first two down-sampling blocks become stream blocks. The last one becomes a narrower
  1x1 convolution. Each stream loses a block, and one block is added at depth 3. Images have 32
  pixels, and widths differ. The variants `parnet_cifar_*` follow this description. No number of the
  paper is claimed for them, because three choices are ours.

  - `downsample0` widens the image and cannot have a shortcut, so it is a gated block at stride 1.
  - The block at depth 3 is a stream block, in the scope `stem`. The depth stays 12.
  - The widths are (p, 2 p, 4 p, 8 p) with p = 48, 96 and 160.

  Attributes besides those of `Classifier`:
    stage_sizes: number of blocks in each of the three streams.
    widths: number of channels of the three streams, and of the map that the classifier reads.
    strides: strides of `downsample0` and `downsample1`, each 1 or 2. A block that keeps the shape
      is a stream block. `downsample0` has at most 64 channels if `downsample1` has stride 2.
    stem_blocks: number of stream blocks after these two.
    last_block: "downsample", or "conv1x1" at stride 1.
    act: "silu" as in the paper. The weights that the authors released were trained with "relu".
  """

  stage_sizes: Sequence[int] = (4, 5, 5)
  widths: Sequence[int] = (92, 192, 384, 1280)
  strides: Sequence[int] = (2, 2)
  stem_blocks: int = 0
  last_block: str = "downsample"
  act: str = "silu"

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
    super().__post_init__()

  @property
  def image_size(self) -> int:
    """The side in pixels of the images that the variants are made for."""
    return 32 if math.prod(self.strides) == 1 else 224

  @nn.nowrap
  def total_stride(self) -> int:
    """Returns the ratio of the size of the image to the size of the last map."""
    return math.prod(self.strides) * (8 if self.last_block == "downsample" else 4)

  @nn.nowrap
  def maps(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
    """Runs all scopes but the classifier, and returns the four maps of the class docstring."""

    def run_scope(scope: str, *inputs: jax.Array) -> jax.Array:
      return self.build(scope, inputs[0].shape[-1])(*inputs, train)

    # The shapes are those at the default `strides`.
    x = run_scope("downsample0", x)  # (N, H/2, W/2, min(64, C1))
    map1 = run_scope("downsample1", x)  # (N, H/4, W/4, C1)
    if self.stem_blocks:
      map1 = run_scope("stem", map1)
    map2 = run_scope("downsample2", map1)  # (N, H/8, W/8, C2)
    map3 = run_scope("downsample3", map2)  # (N, H/16, W/16, C3)
    # The three streams do not depend on each other. On several devices they run side by side.
    stream1 = run_scope("stream1", map1)  # (N, H/4, W/4, C1)
    stream2 = run_scope("stream2", map2)  # (N, H/8, W/8, C2)
    stream3 = run_scope("stream3", map3)  # (N, H/16, W/16, C3)
    fused = run_scope("fusion1", stream1)  # (N, H/8, W/8, C2)
    fused = run_scope("fusion2", stream2, fused)  # (N, H/16, W/16, C3)
    fused = run_scope("fusion3", stream3, fused)  # (N, H/16, W/16, C3)
    last = run_scope("downsample4", fused)  # (N, H/32, W/32, C4)
    return {"stage1": stream1, "stage2": stream2, "stage3": fused, "stage4": last}

  @nn.nowrap
  def build(self, scope: str, channels: int) -> nn.Module:
    """Builds the module of a scope. Call it only inside a compact method.

    Args:
      scope: any scope but the classifier.
      channels: number of channels of the first map that the scope reads. Only the two leading
        scopes need it: they are stream blocks if they keep the shape.
    """
    first, second, third, last = self.widths
    # At most 64 channels, as in the networks that the authors released.
    narrow = min(64, first) if self.strides[1] == 2 else first
    streams = dict(zip(("stream1", "stream2", "stream3"), self.stage_sizes))
    blocks = streams | {"stem": self.stem_blocks}
    if scope in blocks:
      return Stage(blocks[scope] * [self.builder(StreamBlock)], name=scope)
    builders = {
      "downsample0": self._leading(channels, narrow, self.strides[0]),
      "downsample1": self._leading(channels, first, self.strides[1]),
      "downsample2": functools.partial(self.builder(Downsample), second),
      "downsample3": functools.partial(self.builder(Downsample), third),
      "fusion1": functools.partial(self.builder(Downsample), second),
      "fusion2": functools.partial(self.builder(Fusion, inputs=2), third, strides=2),
      "fusion3": functools.partial(self.builder(Fusion, inputs=2), third, strides=1),
      "downsample4": functools.partial(self.builder(LAST_BLOCKS[self.last_block]), last),
    }
    return builders[scope](name=scope)

  @nn.nowrap
  def _leading(self, channels: int, features: int, strides: int) -> BlockBuilder:
    """Returns the builder of `downsample0` or `downsample1`.

    A block that keeps the shape is a stream block. Any other block is a `Downsample`.

    Args:
      channels: number of channels that the block reads.
      features: number of channels that the block makes.
      strides: 1 or 2.
    """
    if (features, strides) == (channels, 1):
      return self.builder(StreamBlock)
    return functools.partial(self.builder(Downsample), features, strides)

  # The rest is for deployment, where the streams of one network run on several devices. The table
  # holds as data what `maps` holds as code. A test checks that both compute the same.

  @property
  def stream_scopes(self) -> dict[str, StreamScope]:
    """Maps each scope to its device stream and its inputs, in running order."""
    stem = "stem" if self.stem_blocks else "downsample1"
    scopes = {
      "downsample0": StreamScope(1, ("images",)),
      "downsample1": StreamScope(1, ("downsample0",)),
      "stem": StreamScope(1, ("downsample1",)),
      "downsample2": StreamScope(2, (stem,)),
      "downsample3": StreamScope(3, ("downsample2",)),
      "stream1": StreamScope(1, (stem,)),
      "stream2": StreamScope(2, ("downsample2",)),
      "stream3": StreamScope(3, ("downsample3",)),
      "fusion1": StreamScope(1, ("stream1",)),
      "fusion2": StreamScope(2, ("stream2", "fusion1")),
      "fusion3": StreamScope(3, ("stream3", "fusion2")),
      "downsample4": StreamScope(3, ("fusion3",)),
      "head": StreamScope(3, ("downsample4",)),
    }
    left_out = ("stem",) * (not self.stem_blocks) + ("head",) * self.features_only
    return {scope: row for scope, row in scopes.items() if scope not in left_out}

  @property
  def outputs(self) -> Any:
    """Describes the result of a call, with scope names in place of maps."""
    if not self.features_only:
      return "head"
    return {"stage1": "stream1", "stage2": "stream2", "stage3": "fusion3", "stage4": "downsample4"}

  @nn.compact
  def run(
    self, maps: Mapping[str, jax.Array], scopes: Iterable[str], train: bool = False
  ) -> dict[str, jax.Array]:
    """Runs some scopes of the network, such as those of one device.

    Args:
      maps: maps that the scopes read, by the name of the scope that made them. The first scope
        reads "images", in the dtype of the network.
      scopes: names of the scopes to run, in the order of `stream_scopes`.
      train: as in a call.

    Returns:
      The given maps, and the map or the logits of each scope that ran.
    """
    maps, table = dict(maps), self.stream_scopes
    for scope in scopes:
      inputs = [maps[name] for name in table[scope].reads]
      if scope == "head":
        # `classify` reads the last map of a dictionary, under any key. The key here is the scope.
        maps[scope] = self.classify({"downsample4": inputs[0]}, train)
      else:
        maps[scope] = self.build(scope, inputs[0].shape[-1])(*inputs, train)
    return maps


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
