"""VGG-16 with batch norm, the plain network without branches.

Training form: every 3x3 and the batch norm behind it are a RepConv of one branch. Deploy form: the
VGG-16 without batch norm; nothing else is in it but max-pools, activations and fully connected
layers.

References:
  Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition,
    ICLR 2015, Table 1, configuration D. https://arxiv.org/abs/1409.1556
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.layers import RepConv, activation, linear
from repjax.layers.linear import bias_init, kernel_init
from repjax.layers.base import refuse_training
from repjax.models.base import Settings
from repjax.models.checks import check_classifier, check_images, check_number, check_whole

STAGE_SIZES = (2, 2, 3, 3, 3)
POOLED = 7
"""Height and width of the map that the first fully connected layer reads."""


class VGGBlock(nn.Module):
  """3x3 convolution, batch norm, activation.

  The convolution has a bias in training form too, as in every released checkpoint with batch norm;
  the norm takes away what it adds.
  """

  features: int
  settings: Settings

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    shared = self.settings.of_layers()
    x = RepConv(self.features, branches=("conv3x3",), conv_bias=True, **shared)(x, train)
    return activation(self.settings.act)(x)


class _Stage(nn.Module):
  """Blocks called `block0`, `block1`, ... in the stage's scope, and a 2x2 max-pool."""

  size: int
  build: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    for index in range(self.size):
      x = self.build(name=f"block{index}")(x, train)
    return nn.max_pool(x, (2, 2), (2, 2))  # (N, H/2, W/2, C)


def pool_to(x: jax.Array, size: int) -> jax.Array:
  """Means over `size` x `size` windows that cover a map as evenly as whole pixels allow.

  Window i of an axis of n pixels goes from floor(i n / size) to ceil((i + 1) n / size); windows
  overlap where `size` does not divide n. A map of that size already is returned as it is.

  Args:
    x: (N, H, W, C), of any size.
    size: windows along each axis.

  Returns:
    (N, size, size, C).
  """
  for axis in (1, 2):
    pixels = x.shape[axis]
    if pixels != size:
      windows = [(i * pixels // size, -(-(i + 1) * pixels // size)) for i in range(size)]
      means = [
        jax.lax.slice_in_dim(x, start, stop, axis=axis).mean(axis) for start, stop in windows
      ]
      x = jnp.stack(means, axis)
  return x


class VGG(nn.Module):
  """Five stages of 3x3 convolutions with a max-pool behind each, three fully connected layers.

  Scopes: `stage1` ... `stage5` with `block0`, `block1`, ..., `fc1`, `fc2`, `head`. Images of other
  sizes than 224 px are taken too: the last map is pooled to 7x7, as in torchvision. The kernel of
  `fc1` is (7, 7, C, O), so that its tree says in which order the map is read.

  Attributes:
    widths: output channels of each of the five stages.
    hidden: width of the two hidden fully connected layers.
    num_classes: outputs.
    act: "relu", "silu" or "gelu".
    dropout: rate behind the hidden layers.
    remat: recompute each block in the backward pass instead of keeping what is in it.
    axis_name: of the pmapped axis over which batch norms share statistics; None: per device.
    features_only: return the outputs of stages 2 to 5 instead of logits, and build no fully
      connected layer.
    deploy: build the deploy form.
    dtype: of the computation and the result.
    param_dtype: of the parameters.
  """

  widths: Sequence[int] = (64, 128, 256, 512, 512)
  hidden: int = 4096
  num_classes: int = 1000
  act: str = "relu"
  dropout: float = 0.5
  remat: bool = False
  axis_name: str | None = None
  features_only: bool = False
  deploy: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self):
    check_whole("widths", self.widths, len(STAGE_SIZES))
    check_number("hidden", self.hidden)
    check_classifier(self.num_classes, self.dropout, self.act)
    super().__post_init__()

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> Any:
    """Classifies images.

    Args:
      images: (N, H, W, 3), normalised; H and W at least 32. A row or column that does not fill a
        window of a max-pool is left out.
      train: use and update batch statistics, apply dropout.

    Returns:
      Logits (N, num_classes). With `features_only`: {"stage2": (N, H/4, W/4, C2), ...,
      "stage5": (N, H/32, W/32, C5)}, each behind its max-pool.

    Raises:
      ValueError: images smaller than 32 pixels, or `train` in deploy form.
    """
    refuse_training(self.deploy, train)
    check_images("VGG", images, 32)
    block = nn.remat(VGGBlock, static_argnums=(2,)) if self.remat else VGGBlock

    def build(features: int) -> Callable[..., nn.Module]:
      settings = Settings.of(self)
      return lambda name: block(features=features, settings=settings, name=name)

    x, features = images.astype(self.dtype), {}
    for number, (size, width) in enumerate(zip(STAGE_SIZES, self.widths), 1):
      x = features[f"stage{number}"] = _Stage(size, build(width), name=f"stage{number}")(x, train)
    if self.features_only:
      return {name: x for name, x in features.items() if name != "stage1"}
    return self._classify(pool_to(x, POOLED), train)

  def _classify(self, x: jax.Array, train: bool) -> jax.Array:
    """The fully connected layers: (N, 7, 7, C) to logits (N, num_classes)."""
    act, dtypes = activation(self.act), {"dtype": self.dtype, "param_dtype": self.param_dtype}
    dropout = nn.Dropout(self.dropout, deterministic=not train)
    x = nn.DenseGeneral(
      self.hidden,
      axis=(1, 2, 3),
      name="fc1",
      kernel_init=kernel_init,
      bias_init=bias_init((*x.shape[1:], self.hidden)),
      **dtypes,
    )(x)  # (N, hidden)
    x = linear(dropout(act(x)), self.hidden, name="fc2", **dtypes)
    return linear(dropout(act(x)), self.num_classes, name="head", **dtypes)


VARIANTS: dict[str, dict[str, Any]] = {"vgg16": {}}
