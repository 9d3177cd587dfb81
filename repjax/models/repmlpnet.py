"""RepMLPNet: fully connected layers over tiles, whose weights channels share, and over channels.

In training form each block is y = x + g(u) D(u) with u = BN(x), then z = y + F(BN(y)). D is a
RepDense with share-sets: a fully connected layer over tiles, convolutions beside the layer, and
norms. g is the gate, also called Global Perceptron. F is two 1x1 conv-BN with an activation
between.

The deploy form holds fully connected layers and convolutions with bias, activations and sums. Two
more things stay in it, which no such layer absorbs:

- The gates multiply by numbers computed from the image, which is not affine.
- The norm before D and g stays in each block as a scale and a shift for each channel. Several
  channels share one set of D's weights, so the weights cannot hold a scale for each channel.

All other norms are gone: those of the stem, the down-sampling layers, D and F. The norm before F
folds into F's first layer, which as a 1x1 sees no padding. The norm before the classifier folds
into its kernel and bias, through the mean. There are no statistics. The conversion of the authors
folds D alone.

References:
  Ding et al., RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality, CVPR 2022,
    section 3. https://arxiv.org/abs/2112.11081
  https://github.com/DingXiaoH/RepMLP, repmlpnet.py, for the widths, tiles and share-sets
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn

from repjax.errors import InputError
from repjax.layers import RepConv, RepDense, RepFFN, RepHead, RepNorm, SqueezeExcite
from repjax.layers.composition import pair
from repjax.models.base import Block, Classifier, Stage, last_of
from repjax.models.checks import (
  check_kernels,
  check_number,
  check_stages,
  check_tile,
  check_tiled,
  is_list,
)

GATE_REDUCTION = 4
"""Ratio of a block's number of channels to the width of the hidden layer in its gate."""
EXPANSION = 4
"""Ratio of the width of an FFN's hidden layer to its input's."""


def embed(
  x: jax.Array, train: bool, *, features: int, size: int, name: str, **shared: Any
) -> jax.Array:
  """Applies a convolution over patches that do not overlap, its norm, and ReLU.

  For compact methods: the convolution belongs to the current scope.

  Args:
    x: (N, H, W, C).
    train: as in a call.
    features: number of output channels.
    size: height, width and stride of the convolution in pixels.
    name: scope of the convolution.
    **shared: attributes of the convolution that all layers of the network share.
  """
  branch = f"conv{size}x{size}"
  layer = RepConv(features, branches=(branch,), strides=size, padding=0, name=name, **shared)
  return jax.nn.relu(layer(x, train))


class Stem(Block):
  """The patch embedding.

  Attributes:
    features: number of output channels.
    patch_size: side of a patch in pixels.
  """

  features: int
  patch_size: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, C) to (N, H / patch_size, W / patch_size, features)."""
    sizes = {"features": self.features, "size": self.patch_size}
    return embed(x, train, **sizes, name="RepConv_0", **self.shared())


class RepMLPNetBlock(Block):
  """A gated RepDense after a norm, and an FFN with a norm of its own, each added to its input.

  Attributes:
    tile: height and width in pixels of the tiles of the map.
    share_sets: number of share-sets of the RepDense.
    local_kernels: sizes of the convolutions of the RepDense.
  """

  tile: tuple[int, int]
  share_sets: int
  local_kernels: tuple[int, ...]

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, C) to the same shape."""
    shared = self.shared()
    u = RepNorm(**shared, name="RepNorm_0")(x, train)
    y = RepDense(
      x.shape[-1],
      self.tile,
      share_sets=self.share_sets,
      local_kernels=self.local_kernels,
      **shared,
      name="RepDense_0",
    )(u, train)
    x = x + SqueezeExcite(GATE_REDUCTION, **self.dtypes(), name="SqueezeExcite_0")(y, u)
    return x + RepFFN(EXPANSION, self.act, **shared, name="RepFFN_0")(x, train)


class Head(Block):
  """The classifier: a norm, the mean over pixels, dropout, and a fully connected layer.

  Attributes:
    num_classes: number of outputs.
    dropout: dropout rate in front of the fully connected layer.
  """

  num_classes: int
  dropout: float

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, C) to logits (N, num_classes)."""
    return RepHead(self.num_classes, self.dropout, **self.shared(), name="RepHead_0")(x, train)


class RepMLPNet(Classifier, kw_only=True):
  """A patch embedding, stages of blocks with 2x2 down-sampling between them, and a classifier.

  Scopes: `stem`, `stage1`, `stage2`, ..., and `head`. Each stage has `block0`, `block1`, ..., and
  each but the first begins with `RepConv_embed`. There are as many stages as `stage_sizes` has
  numbers.

  Parameters do not depend on the image size. The height and width of images are multiples of
  `unit`, that is of every tile times the stride of its stage. The variants take 224 or 256 pixels,
  as their names say. On larger images maps have several tiles, and the output of a tile is put back
  where the tile was. The code of the authors puts the output into different tiles and channels,
  unless each channel has a set of its own. With one tile a stage both are the same.

  With `features_only` the maps are "stage1" (N, H/4, W/4, C1), "stage2" (N, H/8, W/8, C2), and so
  on, at strides patch_size, 2 patch_size, 4 patch_size, ...

  Attributes besides those of `Classifier`:
    stage_sizes: number of blocks in each stage.
    widths: number of channels of each stage.
    tiles: tile of each stage in pixels of its maps, one number or (h, w).
    share_sets: number of share-sets of each stage. Channel c uses set c mod share_sets.
    local_kernels: sizes of the convolutions beside each fully connected layer over tiles.
    patch_size: side of the patches of the embedding in pixels, and its stride.
    act: activation of the FFNs; "gelu" is the exact function. Embeddings have ReLU.
  """

  stage_sizes: Sequence[int]
  widths: Sequence[int]
  tiles: Sequence[int | Sequence[int]]
  share_sets: Sequence[int]
  local_kernels: Sequence[int] = (1, 3)
  patch_size: int = 4
  act: str = "gelu"

  def __post_init__(self):
    check_stages(self.stage_sizes, widths=self.widths, share_sets=self.share_sets)
    if not is_list(self.tiles) or len(self.tiles) != len(self.stage_sizes):
      raise InputError(
        f"tiles takes a tile for each of the {len(self.stage_sizes)} stages in stage_sizes, got "
        f"{self.tiles!r}"
      )
    for index, tile in enumerate(self.tiles):
      check_tile(f"tiles[{index}]", tile)
    check_kernels(self.local_kernels, *self.tiles)
    check_number("patch_size", self.patch_size)
    for width, sets in zip(self.widths, self.share_sets):
      if width < GATE_REDUCTION or width % sets:
        raise InputError(
          f"each of widths is at least {GATE_REDUCTION}, for the gate, and a multiple of its "
          f"stage's share_sets, got {self.widths!r} and {self.share_sets!r}"
        )
    super().__post_init__()

  def strided_tiles(self) -> list[tuple[int, tuple[int, int]]]:
    """Returns the stride of each stage's maps, and the tile (h, w) of the maps."""
    return [(self.patch_size * 2**stage, pair(tile)) for stage, tile in enumerate(self.tiles)]

  def unit(self) -> tuple[int, int]:
    """Returns the height and width in pixels of which those of images are multiples."""
    sides = [[stride * side for side in tile] for stride, tile in self.strided_tiles()]
    height, width = (math.lcm(*column) for column in zip(*sides))
    return height, width

  @property
  def image_size(self) -> int:
    """The side in pixels of the smallest square image; the variants are made for this size."""
    return math.lcm(*self.unit())

  @nn.nowrap
  def total_stride(self) -> int:
    """Returns the ratio of the size of the image to the size of the last map."""
    return self.patch_size * 2 ** (len(self.tiles) - 1)

  @nn.nowrap
  def check_images(self, images: jax.Array) -> None:
    """Raises InputError if the map of a stage does not divide into tiles."""
    tiles = (f"{h}x{w} at stride {stride}" for stride, (h, w) in self.strided_tiles())
    check_tiled(self, images, self.unit(), ", ".join(tiles))

  @nn.nowrap
  def maps(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
    """Runs the embedding and the stages, and returns the output of each stage."""
    x = Stem(self.widths[0], self.patch_size, **self.shared(), name="stem")(x, train)
    shared, maps = self.shared(), {}
    del shared["act"]
    rows = zip(self.stage_sizes, self.widths, self.tiles, self.share_sets)
    for number, (blocks, features, tile, sets) in enumerate(rows, 1):
      name, kernels = f"stage{number}", tuple(self.local_kernels)
      block = functools.partial(self.builder(RepMLPNetBlock), pair(tile), sets, kernels)
      sizes = {"features": features, "size": 2, "name": "RepConv_embed"}
      first = functools.partial(embed, **sizes, **shared) if number > 1 else None
      x = maps[name] = Stage(blocks * [block], first, name=name)(x, train)
    return maps

  @nn.nowrap
  def classify(self, maps: Mapping[str, jax.Array], train: bool) -> jax.Array:
    """Returns logits (N, num_classes) from a head with a norm of its own."""
    head = Head(self.num_classes, self.dropout, **self.shared(), name="head")
    return head(last_of(maps), train)


_AT_224 = {"tiles": (56, 28, 14, 7)}
_AT_256 = {"tiles": (64, 32, 16, 8)}
_T = {"stage_sizes": (2, 2, 6, 2), "widths": (64, 128, 256, 512), "share_sets": (1, 4, 16, 128)}
_B = {"stage_sizes": (2, 2, 12, 2), "widths": (96, 192, 384, 768), "share_sets": (1, 4, 32, 128)}
_D = {"stage_sizes": (2, 2, 18, 2), "widths": (80, 160, 320, 640), "share_sets": (1, 4, 16, 128)}
_L = {"stage_sizes": (2, 2, 18, 2), "widths": (96, 192, 384, 768), "share_sets": (1, 4, 32, 256)}

VARIANTS: dict[str, dict[str, Any]] = {
  "repmlpnet_t224": _T | _AT_224,
  "repmlpnet_t256": _T | _AT_256,
  "repmlpnet_b224": _B | _AT_224,
  "repmlpnet_b256": _B | _AT_256,
  "repmlpnet_d256": _D | _AT_256,
  "repmlpnet_l256": _L | _AT_256,
}
