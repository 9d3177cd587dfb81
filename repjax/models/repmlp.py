"""RepMLP (2021): its block, and a network for CIFAR-10 made of this block and 1x1 convolutions.

In training form a block is a Global Perceptron, a fully connected layer over tiles (FC3), and a
Local Perceptron of convolutions. In deploy form a block holds fully connected layers with bias
alone: the two of the Global Perceptron, which a ReLU keeps apart, and FC3. The deploy form of a
network holds no batch norm and no statistics.

References:
  Ding et al., RepMLP: Re-parameterizing Convolutions into Fully-connected Layers for Image
    Recognition, 2021, sections 3 and 4.1. https://arxiv.org/abs/2105.01883
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.core import FrozenDict

from repjax.errors import InputError
from repjax.layers import GlobalPerceptron, RepConv, RepDense, RepLayer, activation
from repjax.layers.composition import pair
from repjax.models.base import Block, Classifier, Stage
from repjax.models.checks import check_kernels, check_number, check_stages, check_tile, check_tiled


class RepMLP(RepLayer):
  """The block of RepMLP: y = RepDense(GlobalPerceptron(x)), without any activation.

  A map of one tile has no Global Perceptron.

  Attributes:
    features: number of output channels.
    tile: height and width of a tile in pixels, one number or (h, w). H and W are multiples of them.
    groups: number of groups of FC3 and of the local convolutions.
    reduction: ratio of the widths of the Global Perceptron's input and of its hidden layer.
    local_kernels: sizes of the local convolutions; none leaves the Local Perceptron out.
    global_perceptron: build the Global Perceptron.
    fc3: "dense", or for an ablation the name of a convolution ("conv9x9") in place of FC3. This
      convolution and the local ones have `groups` groups, and run over the whole map, not over
      tiles.
  """

  features: int
  tile: int | Sequence[int]
  groups: int = 1
  reduction: int = 1
  local_kernels: Sequence[int] = (1, 3, 5)
  global_perceptron: bool = True
  fc3: str = "dense"

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, H, W, C) to (N, H, W, O).

    Raises:
      InputError: parameters have a Global Perceptron for a map that has none, or the reverse; or
        the map or the attributes do not fit the layers.
      ValueError: `train` in deploy form.
    """
    perceives = self.global_perceptron and tuple(x.shape[1:3]) != pair(self.tile)
    self._check_perceptron(x.shape, perceives)
    if perceives:
      x = GlobalPerceptron(self.tile, self.reduction, **self.shared())(x, train)
    if self.fc3 != "dense":
      local = (f"conv{size}x{size}" for size in self.local_kernels)
      branches = (self.fc3, *(name for name in local if name != self.fc3))
      return RepConv(self.features, branches, groups=self.groups, **self.shared())(x, train)
    layer = RepDense(
      self.features, self.tile, self.groups, local_kernels=self.local_kernels, **self.shared()
    )
    return layer(x, train)

  def _check_perceptron(self, shape: tuple[int, ...], wanted: bool) -> None:
    """Raises InputError if there are parameters and they belong to a different kind of map.

    Flax would silently ignore the parameters of a Global Perceptron that no layer asks for.
    """
    scopes = ("GlobalPerceptron_0", "RepDense_0", "RepConv_0")
    held, *others = (self.has_variable("params", scope) for scope in scopes)
    if any(others) and held != wanted:
      has, lack = ("hold a", "has none") if held else ("hold no", "needs one")
      raise InputError(
        f"RepMLP {'/'.join(self.path)}: the parameters {has} Global Perceptron, and a map {shape} "
        f"in tiles of {'x'.join(map(str, pair(self.tile)))} pixels with global_perceptron="
        f"{self.global_perceptron} {lack}, since only maps of several tiles have it. Use images, "
        "tile and global_perceptron with which the parameters were made"
      )


class _CifarBlock(Block):
  """A RepMLP or a convolution in its place, then a 1x1 conv-BN, each with an activation after it.

  Attributes:
    mixer: "repmlp", or the name of a convolution.
    repmlp: attributes of the RepMLP besides its width and those of the block.
  """

  mixer: str
  repmlp: Mapping[str, Any]

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, C) to the same shape."""
    features, size = x.shape[-1], convolution_size(self.mixer)
    if size is None:
      mixer = RepMLP(features, **self.repmlp, **self.shared(), name="repmlp")
    else:
      mixer = self.conv_bn("mixer", features, size)
    x = self.activate(mixer(x, train))
    return self.activate(self.conv_bn("conv", features, 1)(x, train))


def widen(x: jax.Array, train: bool, *, features: int, act: str, **shared: Any) -> jax.Array:
  """Applies a 1x1 conv-BN and an activation, in the current scope; for compact methods."""
  conv = RepConv(features, branches=("conv1x1",), **shared, name="RepConv_widen")
  return activation(act)(conv(x, train))


class RepMLPCifar(Classifier, kw_only=True):
  """Stages of RepMLP blocks and 1x1 convolutions, max-pools between, a mean, and a classifier.

  The paper describes its pure MLP for CIFAR-10 in part. There are three stages at 32, 16 and 8
  pixels, of 16, 32 and 64 channels. RepMLP alternates with 1x1 convolutions, and max-pools lie
  between the stages. A batch norm follows every convolution. ReLU follows every RepMLP and every
  convolution. Tiles are 8x8, with 2 groups and local kernels 1, 3, 5 and 7. The number of blocks is
  in a figure alone. This network is not claimed to be the network of the paper. Four choices are
  ours:

  - A stage is a 1x1 convolution to its width, then two pairs of RepMLP and 1x1 convolution.
  - The first convolution of a stage comes after the pool, which is 2x2.
  - The hidden layer of the Global Perceptron is not reduced. The last stage, one tile, has none.
  - There are no shortcuts. A global mean and a linear classifier end the network.

  The deploy form has 52.5 million multiply-accumulates; the paper prints 52.8. The wide ConvNet for
  comparison, `mixer="conv3x3", widths=(32, 64, 128)`, has 64.1 million and 0.44 million parameters;
  the paper prints 65.1 and 0.50. So this ConvNet is not the network of the paper either.

  Four overrides give the ablations of the paper: `local_kernels=()`, `global_perceptron=False`,
  `fc3="conv9x9"` with the groups of the block, and `mixer="conv9x9"`, a convolution without groups
  in place of the whole RepMLP.

  Scopes: `stage1`, `stage2`, ... with `RepConv_widen` and `block0`, `block1`, ..., and `head`. The
  height and width of images are multiples of the tile's at every stage. With `features_only` the
  maps are "stage1" (N, H, W, C1), and so on, each half as high and wide as the one before.

  Attributes besides those of `Classifier`:
    stage_sizes: number of pairs of RepMLP and 1x1 convolution in each stage.
    widths: number of channels of each stage.
    tile: height and width of a tile in pixels, one number or (h, w). In the size for which the
      model is made, the last stage has one tile. The map of every stage divides into tiles.
    fc3_groups: number of groups of FC3 and of the local convolutions.
    reduction: ratio of the widths of the Global Perceptron's input and of its hidden layer.
    local_kernels: sizes of the local convolutions.
    global_perceptron: build the Global Perceptrons.
    fc3: "dense", or the name of a convolution in place of FC3.
    mixer: "repmlp", or the name of a convolution in place of the whole block.
  """

  stage_sizes: Sequence[int] = (2, 2, 2)
  widths: Sequence[int] = (16, 32, 64)
  tile: int | Sequence[int] = 8
  fc3_groups: int = 2
  reduction: int = 1
  local_kernels: Sequence[int] = (1, 3, 5, 7)
  global_perceptron: bool = True
  fc3: str = "dense"
  mixer: str = "repmlp"
  num_classes: int = 10

  def __post_init__(self):
    check_stages(self.stage_sizes, widths=self.widths)
    check_tile("tile", self.tile)
    check_kernels(self.local_kernels, self.tile)
    check_number("fc3_groups", self.fc3_groups)
    check_number("reduction", self.reduction)
    for field, plain in (("fc3", "dense"), ("mixer", "repmlp")):
      value = getattr(self, field)
      if value != plain and convolution_size(value) is None:
        raise InputError(
          f'{field} is "{plain}", or a convolution of odd size such as "conv9x9", got {value!r}'
        )
    super().__post_init__()

  @property
  def image_size(self) -> int:
    """The side in pixels of the images that the model is made for."""
    return max(pair(self.tile)) * 2 ** (len(self.widths) - 1)

  @nn.nowrap
  def total_stride(self) -> int:
    """Returns the ratio of the size of the image to the size of the last map."""
    return 2 ** (len(self.widths) - 1)

  @nn.nowrap
  def check_images(self, images: jax.Array) -> None:
    """Raises InputError if the map of a stage does not divide into tiles."""
    shrinks, (height, width) = self.total_stride(), pair(self.tile)
    unit = (shrinks * height, shrinks * width)
    check_tiled(self, images, unit, f"{height}x{width} pixels, the last at stride {shrinks}")

  @nn.nowrap
  def maps(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
    """Runs the stages with max-pools between them, and returns the output of each stage."""
    block = functools.partial(self.builder(_CifarBlock), self.mixer, self.repmlp())
    maps = {}
    for number, (features, blocks) in enumerate(zip(self.widths, self.stage_sizes), 1):
      if number > 1:
        x = nn.max_pool(x, (2, 2), (2, 2))  # (N, H/2, W/2, C)
      first = functools.partial(widen, features=features, **self.shared())
      name = f"stage{number}"
      x = maps[name] = Stage(blocks * [block], first, name=name)(x, train)
    return maps

  @nn.nowrap
  def repmlp(self) -> FrozenDict[str, Any]:
    """Returns the attributes of every RepMLP besides its width and those of all layers."""
    attributes: dict[str, Any] = {
      "tile": self.tile,
      "groups": self.fc3_groups,
      "reduction": self.reduction,
      "local_kernels": tuple(self.local_kernels),
      "global_perceptron": self.global_perceptron,
      "fc3": self.fc3,
    }
    return FrozenDict(attributes)


def convolution_size(name: str) -> int | None:
  """Returns K of a name convKxK with odd K, and None for any other name."""
  match = re.fullmatch(r"conv(\d+)x\1", str(name))
  return int(match[1]) if match and int(match[1]) % 2 else None


VARIANTS: dict[str, dict[str, Any]] = {"repmlp_cifar": {}}
