"""The bases of every network: what all networks share, the classifier, its stages and blocks."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.layers import RepConv, RepLayer, activation, linear
from repjax.layers.attributes import check_dtypes
from repjax.layers.base import check_training, dtypes_of, refuse_training, training_of
from repjax.models.checks import check_classifier, check_flags, check_pixels, check_total_stride


class Block(RepLayer, kw_only=True):
  """A part of a network, made of layers that share the attributes of the block.

  A block is called with (x, train) and returns a map.

  Attributes:
    act: name of the activation: "relu", "silu" or "gelu".
  """

  act: str

  @nn.nowrap
  def conv_bn(
    self, name: str, features: int, size: int, strides: int = 1, dilation: int = 1
  ) -> RepConv:
    """Builds a convolution and its batch norm, in the scope `RepConv_<name>` of the block."""
    return RepConv(
      features,
      branches=(f"conv{size}x{size}",),
      strides=strides,
      dilation=dilation,
      **self.shared(),
      name=f"RepConv_{name}",
    )

  @nn.nowrap
  def activate(self, x: jax.Array) -> jax.Array:
    """Applies the activation."""
    return activation(self.act)(x)


BlockBuilder = Callable[..., nn.Module]
"""A function that builds a block, given `name` and perhaps more attributes.

Builders are partials of the class of the block, so that the block belongs to the scope in which the
builder is called. A bound method would put the block into the scope of the network.
"""


def run(builders: Sequence[BlockBuilder], x: jax.Array, train: bool) -> jax.Array:
  """Builds blocks in the current scope, and applies them one after the other."""
  for build in builders:
    x = build()(x, train)
  return x


class Stage(nn.Module):
  """A row of blocks, in the scopes `block0`, `block1`, ... of the stage.

  Attributes:
    blocks: one builder for each block.
    first: function of (x, train) that runs in the scope of the stage before the blocks.
    last: function of x that runs after the blocks.
  """

  blocks: Sequence[BlockBuilder]
  first: Callable[[jax.Array, bool], jax.Array] | None = None
  last: Callable[[jax.Array], jax.Array] | None = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, C) to the output of the last block."""
    if self.first is not None:
      x = self.first(x, train)
    for index, build in enumerate(self.blocks):
      x = build(name=f"block{index}")(x, train)
    return x if self.last is None else self.last(x)


class Network(nn.Module, kw_only=True):
  """A network in two forms; the base of `Classifier` and of `Segmenter`.

  The attributes below are shared by all families; each family documents its own attributes. All are
  given by keyword.

  Attributes:
    num_classes: number of classes.
    act: name of the activation: "relu", "silu" or "gelu".
    dropout: dropout rate in front of the layer that gives logits.
    remat: recompute each block in the backward pass instead of keeping its activations.
    axis_name: name of the pmapped axis over which batch norms share their statistics. None keeps
      the statistics of each device apart.
    running_variance: "unbiased" or "biased", the variance of a batch that running variances
      average; see `RepLayer`.
    statistics: "auto", "covariance" or "outputs", the way in which training finds the statistics of
      1x1 branches; see `RepLayer`.
    features_only: return the maps of the stages by name instead of logits, and build nothing that
      makes logits of them.
    deploy: build the deploy form.
    dtype: dtype of the computation and of the result.
    param_dtype: dtype of the parameters.
    task: what the network is for, "classification" or "segmentation". Fixed by the class.
  """

  task: ClassVar[str]

  num_classes: int = 1000
  act: str = "relu"
  dropout: float = 0.0
  remat: bool = False
  axis_name: str | None = None
  running_variance: str = "unbiased"
  statistics: str = "auto"
  features_only: bool = False
  deploy: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self):
    check_classifier(self.num_classes, self.dropout, self.act)
    check_flags(self)
    check_training(self)
    check_dtypes(dtype=self.dtype, param_dtype=self.param_dtype)
    super().__post_init__()

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> Any:
    """Classifies images, or each of their pixels.

    Args:
      images: (N, H, W, 3), normalised. Each family says which sizes it takes.
      train: use and update batch statistics, and apply dropout.

    Returns:
      Logits in `dtype`: (N, num_classes) of a classifier, (N, H, W, num_classes) of a segmenter.
      With `features_only`, the maps of the stages by name, each (N, H', W', C').

    Raises:
      InputError: images of a shape that the network does not take, or of complex numbers.
      ValueError: `train` in deploy form.
    """
    refuse_training(self.deploy, train)
    self.check_images(images)
    check_pixels(images)
    maps = self.maps(images.astype(self.dtype), train)
    return dict(maps) if self.features_only else self.predict(maps, images.shape[1:3], train)

  @nn.nowrap
  def check_images(self, images: jax.Array) -> None:
    """Raises InputError if the network cannot take images of this shape."""
    raise NotImplementedError

  # `nowrap` marks plain helpers: Linen neither traces them as calls nor names them in programs.
  @nn.nowrap
  def maps(self, x: jax.Array, train: bool) -> Mapping[str, jax.Array]:
    """Returns the output of each stage by name, in order; logits are made of the last one.

    Args:
      x: images (N, H, W, 3) in `dtype`.
      train: as in a call.
    """
    raise NotImplementedError

  @nn.nowrap
  def predict(self, maps: Mapping[str, jax.Array], size: Sequence[int], train: bool) -> Any:
    """Returns logits and, in training with auxiliary heads, theirs by name.

    Args:
      maps: the output of `maps`.
      size: height and width of the images.
      train: as in a call.
    """
    raise NotImplementedError

  @nn.nowrap
  def start(self, variables: dict[str, Any]) -> dict[str, Any]:
    """Returns freshly drawn variables with the values that the names of leaves do not tell.

    Args:
      variables: variables as `repjax.init` draws them from names and shapes. They are not changed.
    """
    return variables

  @nn.nowrap
  def shared(self) -> dict[str, Any]:
    """Returns the attributes that the network passes on to every block, by name."""
    return {
      "act": self.act,
      "deploy": self.deploy,
      **training_of(self),
      **self.dtypes(),
    }

  @nn.nowrap
  def dtypes(self) -> dict[str, Any]:
    """Returns `dtype` and `param_dtype` by name, for layers that are the same in both forms."""
    return dtypes_of(self)

  @nn.nowrap
  def builder(self, block: type[Block], inputs: int = 1) -> BlockBuilder:
    """Returns a function that builds blocks of a class with the shared attributes.

    Args:
      block: class of the blocks.
      inputs: number of maps that a block reads; `train` follows the maps in a call.
    """
    # `train` decides what a block builds, so that rematerialisation must not trace the argument.
    chosen = nn.remat(block, static_argnums=(inputs + 1,)) if self.remat else block
    return functools.partial(chosen, **self.shared())


class Classifier(Network, kw_only=True):
  """An image classifier in two forms; the base of every family of classifiers.

  A family writes its blocks, and `maps` and `total_stride`. A family that does not take images of
  every size overrides `check_images` too. A family whose classifier is not a mean and one fully
  connected layer overrides `classify`. The attributes are those of `Network`.
  """

  task: ClassVar[str] = "classification"

  @nn.nowrap
  def total_stride(self) -> int:
    """Returns the ratio of the size of the image to the size of the last map."""
    raise NotImplementedError

  @nn.nowrap
  def check_images(self, images: jax.Array) -> None:
    """Raises InputError if images are smaller than the total stride, or are no batch."""
    check_total_stride(self, images, self.total_stride())

  @nn.nowrap
  def predict(self, maps: Mapping[str, jax.Array], size: Sequence[int], train: bool) -> Any:
    """Returns the output of `classify`, which does not depend on the size of the images."""
    del size
    return self.classify(maps, train)

  @nn.nowrap
  def classify(self, maps: Mapping[str, jax.Array], train: bool) -> Any:
    """Returns logits (N, num_classes): mean over pixels, dropout, fully connected layer.

    Args:
      maps: the output of `maps`.
      train: as in a call.
    """
    x = last_of(maps).mean((1, 2))  # (N, C)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return linear(x, self.num_classes, name="head", **self.dtypes())


def last_of(maps: Mapping[str, jax.Array]) -> jax.Array:
  """Returns the last of several maps."""
  return list(maps.values())[-1]


class StreamScope(NamedTuple):
  """A top-level scope of a network whose streams run side by side.

  Such a network has three members. `stream_scopes` is a table {scope: StreamScope}, in an order in
  which the scopes can run. `outputs` is the result, with scopes in the place of their maps.
  `run(maps, scopes)` runs some scopes. It takes maps by the name of the scope that made them, and
  returns the same maps and those of the scopes that ran.

  Attributes:
    stream: number of the stream to which the scope belongs, from 1.
    reads: scopes, or "images", whose maps the scope reads.
  """

  stream: int
  reads: tuple[str, ...]
