"""RepMLPNet: fully connected layers over tiles, whose weights channels share, and over channels.

Training form: each block is y = x + g(u) D(u) with u = BN(x), then z = y + F(BN(y)). D is a
RepDense with share-sets (a fully connected layer over tiles, convolutions beside it, norms), g the
gate (the Global Perceptron), F two 1x1 conv-BN with an activation between them.

Deploy form: fully connected layers and convolutions with bias, activations, sums, and two things
that no such layer absorbs:
- the gates: they multiply by numbers computed from the image, which is not affine;
- per block the norm in front of D and g, as a scale and a shift for each channel: several channels
  share one set of D's weights, so the weights cannot hold a scale for each.
All other norms are gone: of the stem, the down-sampling layers, D and F, the one in front of F
(in F's first layer, which as a 1x1 sees no padding) and the one in front of the classifier (in its
kernel and bias, through the mean). There are no statistics. The authors' conversion folds D alone.

References:
  Ding et al., RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality, CVPR 2022,
    section 3. https://arxiv.org/abs/2112.11081
  https://github.com/DingXiaoH/RepMLP, repmlpnet.py, for the widths, tiles and share-sets
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.errors import InputError
from repjax.layers import RepConv, RepDense, RepFFN, RepHead, RepNorm, SqueezeExcite
from repjax.layers.rep_conv import pair
from repjax.layers.base import refuse_training
from repjax.models.base import Settings
from repjax.models.checks import (
  check_classifier,
  check_kernels,
  check_number,
  check_stages,
  check_tile,
  is_list,
)

GATE_REDUCTION = 4
EXPANSION = 4  # of the FFNs


class Stage(NamedTuple):
  """What a stage is built of.

  Attributes:
    name: its scope.
    blocks: how many it has.
    features: channels.
    tile: (h, w) of its maps' tiles, in pixels.
    share_sets: of each block's RepDense.
    local_kernels: of the same; all stages have them alike.
    shrinks: how many times its first layer makes maps smaller; 1 where the stem has done so.
    stride: how many times its maps are smaller than the image.
  """

  name: str
  blocks: int
  features: int
  tile: tuple[int, int]
  share_sets: int
  local_kernels: tuple[int, ...]
  shrinks: int
  stride: int


def embed(
  x: jax.Array, features: int, size: int, name: str, settings: Settings, train: bool
) -> jax.Array:
  """A convolution over patches that do not overlap, its norm, and ReLU; for compact methods."""
  branch = f"conv{size}x{size}"
  layer = RepConv(
    features, branches=(branch,), strides=size, padding=0, name=name, **settings.of_layers()
  )
  return jax.nn.relu(layer(x, train))


class Block(nn.Module):
  """Norm, RepDense and gate; FFN with a norm of its own; both with a sum over the input."""

  stage: Stage
  settings: Settings

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    stage, settings, shared = self.stage, self.settings, self.settings.of_layers()
    u = RepNorm(**shared, name="RepNorm_0")(x, train)
    y = RepDense(
      stage.features,
      stage.tile,
      share_sets=stage.share_sets,
      local_kernels=stage.local_kernels,
      **shared,
      name="RepDense_0",
    )(u, train)
    gate = SqueezeExcite(
      GATE_REDUCTION, settings.dtype, settings.param_dtype, name="SqueezeExcite_0"
    )
    x = x + gate(y, u)
    return x + RepFFN(EXPANSION, settings.act, **shared, name="RepFFN_0")(x, train)


class _Stem(nn.Module):
  """The patch embedding."""

  features: int
  patch_size: int
  settings: Settings

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    return embed(x, self.features, self.patch_size, "RepConv_0", self.settings, train)


class _Stage(nn.Module):
  """Down-sampling, called `RepConv_embed`, then blocks called `block0`, `block1`, ..."""

  stage: Stage
  settings: Settings
  remat: bool

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    stage, settings = self.stage, self.settings
    if stage.shrinks > 1:
      x = embed(x, stage.features, stage.shrinks, "RepConv_embed", settings, train)
    block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
    for index in range(stage.blocks):
      own: dict[str, Any] = {"stage": stage, "settings": settings}
      x = block(**own, name=f"block{index}")(x, train)
    return x


class _Head(nn.Module):
  """The classifier."""

  num_classes: int
  dropout: float
  settings: Settings

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    shared = self.settings.of_layers()
    return RepHead(self.num_classes, self.dropout, **shared, name="RepHead_0")(x, train)


class RepMLPNet(nn.Module):
  """Patch embedding, stages of blocks with a 2x2 down-sampling between them, norm, mean, linear.

  Scopes: `stem`, `stage1`, `stage2`, ..., each with `RepConv_embed` (the first without) and
  `block0`, `block1`, ..., and `head`. There are as many stages as `stage_sizes` has numbers.
  Parameters do not depend on the image size, but it must be a multiple of every tile times its
  stage's stride. On larger images than a variant's own, maps have several tiles, and what a tile
  gives is put back where the tile was. The authors' code puts it into other tiles and channels
  there, unless each channel has a set of its own; where each stage has one tile both are the same.

  Attributes:
    stage_sizes: blocks in each stage.
    widths: channels of each stage.
    tiles: of each stage in pixels of its maps, one number or (h, w).
    share_sets: of each stage; channel c of it uses set c mod share_sets.
    local_kernels: sizes of the convolutions beside each fully connected layer over tiles.
    patch_size: of the embedding, in pixels; its stride too.
    num_classes: outputs.
    act: of the FFNs: "relu", "silu" or "gelu" (the exact one). Embeddings have ReLU.
    dropout: rate in front of the classifier.
    remat: recompute each block in the backward pass instead of keeping what is in it.
    axis_name: of the pmapped axis over which batch norms share statistics; None: per device.
    features_only: return the outputs of the stages instead of logits, and build no classifier.
    deploy: build the deploy form.
    dtype: of the computation and the result.
    param_dtype: of the parameters.
  """

  stage_sizes: Sequence[int]
  widths: Sequence[int]
  tiles: Sequence[int | Sequence[int]]
  share_sets: Sequence[int]
  local_kernels: Sequence[int] = (1, 3)
  patch_size: int = 4
  num_classes: int = 1000
  act: str = "gelu"
  dropout: float = 0.0
  remat: bool = False
  axis_name: str | None = None
  features_only: bool = False
  deploy: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

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
    check_classifier(self.num_classes, self.dropout, self.act)
    super().__post_init__()

  def stages(self) -> Iterator[Stage]:
    """The stages, in order."""
    rows = zip(self.stage_sizes, self.widths, self.tiles, self.share_sets)
    kernels = tuple(self.local_kernels)
    for index, (blocks, features, tile, sets) in enumerate(rows):
      shrinks, stride = (2 if index else 1), self.patch_size * 2**index
      dense = (pair(tile), sets, kernels)
      yield Stage(f"stage{index + 1}", blocks, features, *dense, shrinks, stride)

  def unit(self) -> tuple[int, int]:
    """The height and width in pixels that an image must be a multiple of."""
    sides = [[stage.stride * side for side in stage.tile] for stage in self.stages()]
    height, width = (math.lcm(*column) for column in zip(*sides))
    return height, width

  @property
  def image_size(self) -> int:
    """The side of the smallest square image in pixels, for which the variants are made."""
    return math.lcm(*self.unit())

  def _check_size(self, images: jax.Array) -> None:
    unit = self.unit()
    sizes = images.shape[1:3]
    if images.ndim != 4 or not min(sizes) or any(n % of for n, of in zip(sizes, unit)):
      tiles = ", ".join(
        f"{stage.tile[0]}x{stage.tile[1]} at stride {stage.stride}" for stage in self.stages()
      )
      raise InputError(
        f"this RepMLPNet takes images (N, H, W, C) with H a multiple of {unit[0]} and W of "
        f"{unit[1]}, since its maps are cut into tiles of {tiles}; got {images.shape}: use another "
        "image size or other tiles"
      )

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> Any:
    """Classifies images.

    Args:
      images: (N, H, W, 3), normalised; H and W multiples of what `unit` says, which is 224 for the
        variants called so, and 256 for the others.
      train: use and update batch statistics, apply dropout.

    Returns:
      Logits (N, num_classes). With `features_only`: {"stage1": (N, H/4, W/4, C1), "stage2":
      (N, H/8, W/8, C2), ...}, the outputs of each stage's last block, at strides patch_size,
      2 patch_size, 4 patch_size, ...

    Raises:
      ValueError: images that do not divide into tiles, or `train` in deploy form.
    """
    refuse_training(self.deploy, train)
    self._check_size(images)
    settings = Settings.of(self)
    stem = _Stem(self.widths[0], self.patch_size, settings, name="stem")
    x = stem(images.astype(self.dtype), train)
    features = {}
    for stage in self.stages():
      x = features[stage.name] = _Stage(stage, settings, self.remat, name=stage.name)(x, train)
    if self.features_only:
      return features
    return _Head(self.num_classes, self.dropout, settings, name="head")(x, train)


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
