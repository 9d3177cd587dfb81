"""RepMLP (2021): its block, and a network for CIFAR-10 that is made of it and 1x1 convolutions.

Training form of a block: Global Perceptron, fully connected layer over tiles (FC3) and Local
Perceptron. Deploy form: fully connected layers with bias only: the Global Perceptron's two, whose
ReLU keeps them apart, and FC3. Networks hold no batch norm and no statistics then.

References:
  Ding et al., RepMLP: Re-parameterizing Convolutions into Fully-connected Layers for Image
    Recognition, 2021, sections 3 and 4.1. https://arxiv.org/abs/2105.01883
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

from repjax.errors import InputError
from repjax.layers import GlobalPerceptron, RepConv, RepDense, activation, linear
from repjax.layers.rep_conv import pair
from repjax.layers.base import refuse_training
from repjax.models.base import Settings
from repjax.models.checks import (
  check_classifier,
  check_kernels,
  check_number,
  check_stages,
  check_tile,
)


class RepMLP(nn.Module):
  """The block: y = RepDense(GlobalPerceptron(x)), without an activation in it or behind it.

  A map of one tile has no Global Perceptron.

  Attributes:
    features: output channels.
    tile: h and w in pixels, one number or (h, w); H and W are multiples of them.
    groups: of FC3 and of the local convolutions.
    reduction: how many times narrower the Global Perceptron is inside.
    local_kernels: sizes of the local convolutions; none: no Local Perceptron.
    global_perceptron: build the Global Perceptron.
    fc3: "dense", or the name of a convolution ("conv9x9") that takes its place, for an ablation: it
      and the local convolutions, of as many groups, then run over the whole map and not over tiles.
    axis_name: of the pmapped axis over which batch statistics are shared.
    deploy: build the deploy form.
    dtype: of the computation and the result.
    param_dtype: of the parameters.
  """

  features: int
  tile: int | Sequence[int]
  groups: int = 1
  reduction: int = 1
  local_kernels: Sequence[int] = (1, 3, 5)
  global_perceptron: bool = True
  fc3: str = "dense"
  axis_name: str | None = None
  deploy: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, H, W, C) to (N, H, W, O).

    Raises:
      ValueError: parameters with a Global Perceptron for a map that has none, or the reverse; and
        what the two layers refuse.
    """
    common: dict[str, Any] = {
      "axis_name": self.axis_name,
      "deploy": self.deploy,
      "dtype": self.dtype,
      "param_dtype": self.param_dtype,
    }
    perceives = self.global_perceptron and tuple(x.shape[1:3]) != pair(self.tile)
    self._check_perceptron(x.shape, perceives)
    if perceives:
      x = GlobalPerceptron(self.tile, self.reduction, **common)(x, train)
    if self.fc3 != "dense":
      local = (f"conv{size}x{size}" for size in self.local_kernels)
      branches = (self.fc3, *(name for name in local if name != self.fc3))
      return RepConv(self.features, branches, groups=self.groups, **common)(x, train)
    layer = RepDense(
      self.features, self.tile, self.groups, local_kernels=self.local_kernels, **common
    )
    return layer(x, train)

  def _check_perceptron(self, shape: tuple[int, ...], wanted: bool) -> None:
    """Raises InputError where there are parameters and they are for a map of another kind.

    Flax would leave a Global Perceptron that no layer asks for out of the sum without a word.
    """
    scopes = ("GlobalPerceptron_0", "RepDense_0", "RepConv_0")
    held, *others = (self.has_variable("params", scope) for scope in scopes)
    if any(others) and held != wanted:
      has, lack = ("hold a", "has none") if held else ("hold no", "needs one")
      raise InputError(
        f"RepMLP {'/'.join(self.path)}: the parameters {has} Global Perceptron, and a map {shape} "
        f"in tiles of {'x'.join(map(str, pair(self.tile)))} pixels with global_perceptron="
        f"{self.global_perceptron} {lack}, since only maps of several tiles have it; use images of "
        "the size for which the parameters were made, and their model's tile and global_perceptron"
      )


def build_repmlp(
  features: int, arguments: Mapping[str, Any], settings: Settings, name: str
) -> RepMLP:
  """A RepMLP in a network whose layers share settings; for compact methods.

  Args:
    features: output channels.
    arguments: attributes of RepMLP besides those that the settings have.
    settings: of the network.
    name: its scope.
  """
  return RepMLP(features, **arguments, **settings.of_layers(), name=name)


class _CifarBlock(nn.Module):
  """RepMLP or the convolution in its place, activation, 1x1 conv-BN, activation; at one width."""

  mixer: str
  repmlp: FrozenDict[str, Any]
  settings: Settings

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    features, act = x.shape[-1], activation(self.settings.act)
    size = convolution_size(self.mixer)
    if size is None:
      x = build_repmlp(features, self.repmlp, self.settings, "repmlp")(x, train)
    else:
      x = self.settings.conv_bn("mixer", features, size)(x, train)
    return act(self.settings.conv_bn("conv", features, 1)(act(x), train))


class _CifarStage(nn.Module):
  """1x1 conv-BN to the stage's width, activation, then `block0`, `block1`, ..."""

  features: int
  blocks: int
  settings: Settings
  build: Callable[[str], nn.Module]

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = activation(self.settings.act)(self.settings.conv_bn("widen", self.features, 1)(x, train))
    for index in range(self.blocks):
      x = self.build(f"block{index}")(x, train)
    return x


class RepMLPCifar(nn.Module):
  """Stages of RepMLP blocks and 1x1 convolutions with max-pooling between, mean, classifier.

  The paper gives, for its pure MLP on CIFAR-10: three stages at 32, 16 and 8 px of 16, 32 and 64
  channels, RepMLP interleaved with 1x1 convolutions, max-pooling between the stages, batch norm
  behind every convolution, ReLU behind every RepMLP and every convolution, tiles of 8x8, 2 groups,
  local kernels 1, 3, 5 and 7. It leaves to a figure how many blocks there are. Ours are not claimed
  to be the paper's network; what is chosen here:

  - a stage is a 1x1 convolution to its width and then two pairs of RepMLP and 1x1 convolution;
  - the stage's first convolution comes behind the pooling, which is 2x2;
  - the Global Perceptron's hidden layer is not reduced; the last stage, one tile, has none;
  - no shortcuts; a global mean and a linear classifier end it.

  In deploy form this is 52.5 million multiply-accumulates where the paper prints 52.8. Its wide
  ConvNet twin, `mixer="conv3x3", widths=(32, 64, 128)`, has 64.1 where it prints 65.1, and 0.44
  million parameters where it prints 0.50, so it is not the paper's network either.

  Its ablations: `local_kernels=()`, `global_perceptron=False`, `fc3="conv9x9"`, which has the
  block's groups, and `mixer="conv9x9"` for a convolution without groups in place of the whole
  RepMLP.

  Scopes: `stage1`, `stage2`, ... with `RepConv_widen` and `block0`, `block1`, ..., and `head`.

  Attributes:
    stage_sizes: pairs of RepMLP and 1x1 convolution in each stage.
    widths: channels of each stage.
    tile: h and w in pixels, one number or (h, w); the last stage's map if images have the size for
      which the model is made. Every stage's map divides into tiles.
    fc3_groups: groups of FC3 and of the local convolutions.
    reduction: how many times narrower the Global Perceptron is inside.
    local_kernels: sizes of the local convolutions.
    global_perceptron: build the Global Perceptrons.
    fc3: "dense", or a convolution that takes FC3's place.
    mixer: "repmlp", or a convolution that takes the whole block's place.
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
  act: str = "relu"
  dropout: float = 0.0
  remat: bool = False
  axis_name: str | None = None
  features_only: bool = False
  deploy: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

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
    check_classifier(self.num_classes, self.dropout, self.act)
    super().__post_init__()

  @property
  def image_size(self) -> int:
    """The side in pixels of the images that the model is made for."""
    return max(pair(self.tile)) * 2 ** (len(self.widths) - 1)

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> Any:
    """Classifies images.

    Args:
      images: (N, H, W, 3), normalised; H and W multiples of the tile's at every stage.
      train: use and update batch statistics, apply dropout.

    Returns:
      Logits (N, num_classes). With `features_only`: {"stage1": (N, H, W, C1), ...}, each half as
      high and wide as the one before.

    Raises:
      ValueError: images that do not divide into tiles, or `train` in deploy form.
    """
    refuse_training(self.deploy, train)
    self._check_images(images)
    settings = Settings.of(self)
    arguments: dict[str, Any] = {
      "tile": self.tile,
      "groups": self.fc3_groups,
      "reduction": self.reduction,
      "local_kernels": tuple(self.local_kernels),
      "global_perceptron": self.global_perceptron,
      "fc3": self.fc3,
    }
    repmlp = FrozenDict(arguments)
    block = nn.remat(_CifarBlock, static_argnums=(2,)) if self.remat else _CifarBlock

    def build(name: str) -> nn.Module:
      return block(self.mixer, repmlp, settings, name=name)

    x, features = images.astype(self.dtype), {}
    for number, (width, blocks) in enumerate(zip(self.widths, self.stage_sizes), 1):
      x = nn.max_pool(x, (2, 2), (2, 2)) if number > 1 else x
      x = _CifarStage(width, blocks, settings, build, name=f"stage{number}")(x, train)
      features[f"stage{number}"] = x
    if self.features_only:
      return features
    x = x.mean((1, 2))  # (N, C)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    return linear(x, self.num_classes, name="head", **dtypes)

  def _check_images(self, images: jax.Array) -> None:
    last = 2 ** (len(self.widths) - 1)
    unit = [side * last for side in pair(self.tile)]
    if images.ndim != 4 or any(
      not size or size % step for size, step in zip(images.shape[1:3], unit)
    ):
      raise InputError(
        f"this RepMLP shrinks images {last} times and cuts every map into tiles of "
        f"{'x'.join(map(str, pair(self.tile)))} pixels, so images must be (N, H, W, C) with H a "
        f"multiple of {unit[0]} and W of {unit[1]}; got {images.shape}: use another image size or "
        "another tile"
      )


def convolution_size(name: str) -> int | None:
  """K of a name convKxK with odd K; None for any other."""
  match = re.fullmatch(r"conv(\d+)x\1", str(name))
  return int(match[1]) if match and int(match[1]) % 2 else None


VARIANTS: dict[str, dict[str, Any]] = {"repmlp_cifar": {}}
