"""Small networks in other people's styles, none of them of this package's layers."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import lax

import repjax
from repjax.fusion import Fused
from tests.helpers import quick_jit

F64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}
SIZES = ((2, 16, 16), (1, 20, 18), (2, 15, 17), (1, 13, 13))
Conv = functools.partial(nn.Conv, use_bias=False, **F64)
Norm = functools.partial(nn.BatchNorm, use_running_average=True, **F64)
Dense = functools.partial(nn.Dense, **F64)


class Net(NamedTuple):
  """A network and what fusing it must reach.

  Attributes:
    function: takes parameters and images.
    params: shapes and dtypes of the parameters.
    products: convolutions and matrix products before and after.
    shape: makes the shape of the images from batch, height and width.
    norms: scales and shifts that stay, since they follow no product.
    sizes: batch, height and width to try.
    tolerance: largest relative error.
    also: fuse for all sizes at once, since they differ in what merges.
  """

  function: Callable[..., Any]
  params: Any
  products: tuple[int, int]
  shape: Callable[..., tuple[int, ...]] = lambda n, h, w: (n, h, w, 3)
  norms: int = 0
  sizes: tuple[tuple[int, int, int], ...] = SIZES
  tolerance: float = 1e-12
  also: bool = False

  def images(self, size: tuple[int, int, int]) -> jax.Array:
    """Returns random images of a size."""
    return jnp.asarray(np.random.default_rng(1).normal(size=self.shape(*size)))


def randomised(tree: Any, seed: int = 0) -> Any:
  """Returns random numbers for all parameters; variances and scales are positive."""
  rng, drawn = np.random.default_rng(seed), []
  paths, structure = jax.tree_util.tree_flatten_with_path(tree)
  for path, leaf in paths:
    name = jax.tree_util.keystr(path)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      drawn.append(jnp.zeros(leaf.shape, leaf.dtype))
      continue
    fan_in = np.sqrt(max(1, np.prod(leaf.shape) / max(1, *leaf.shape, 1)))
    value = rng.normal(size=leaf.shape) / (fan_in if len(leaf.shape) > 1 else 1)
    positive = "var" in name or "scale" in name
    value = rng.uniform(0.5, 2, leaf.shape) if positive else value
    drawn.append(jnp.asarray(value, jax.dtypes.canonicalize_dtype(leaf.dtype)))
  return structure.unflatten(drawn)


@contextlib.contextmanager
def lenient() -> Iterator[None]:
  """Allows what other people's networks do: promotion of ranks and dtypes."""
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    yield


def fused_error(net: Net, sizes: Iterable[tuple[int, int, int]]) -> tuple[float, Fused]:
  """Returns the largest relative error of a fused network at some sizes, and the network."""
  params, errors = randomised(net.params), []
  first, *others = map(net.images, net.sizes)
  also = others if net.also else ()
  fused = repjax.fuse(net.function, net.params, first, check=False, also=also)
  small = fused.fold(params)
  # Compiled together, which takes less time than twice.
  both = quick_jit(lambda small, params, x: (fused(small, x), net.function(params, x)))
  for size in sizes:
    pairs = zip(*map(jax.tree.leaves, both(small, params, net.images(size))), strict=True)
    errors += [np.abs(a - b).max() / np.abs(b).max() for a, b in pairs]
  return float(np.max(errors)), fused  # NumPy's maximum is NaN if one of them is


def shapes(**kernels: tuple[int, ...]) -> dict[str, Any]:
  """Returns the shapes of parameters in float64, "norm" ones as the four vectors of a norm."""

  def one(name: str, shape: tuple[int, ...]) -> Any:
    leaf = jax.ShapeDtypeStruct(shape, jnp.float64)
    norm = name.startswith("norm")
    return dict.fromkeys(("scale", "bias", "mean", "var"), leaf) if norm else leaf

  return {name: one(name, shape) for name, shape in kernels.items()}


def linen(module: nn.Module, products: tuple[int, int], **settings: Any) -> Net:
  """Returns a network of Flax Linen."""
  shape = settings.get("shape", Net._field_defaults["shape"])
  images = jnp.zeros(shape(*settings.get("sizes", SIZES)[0]))
  params = jax.eval_shape(lambda: module.init(jax.random.key(0), images))
  return Net(module.apply, params, products, **settings)


def normalised(y: jax.Array, norm: dict[str, jax.Array], axis: int = -1) -> jax.Array:
  """Returns a batch norm at inference, along an axis."""
  shape = [1] * y.ndim
  shape[axis] = -1
  mean, var, scale, bias = (norm[key].reshape(shape) for key in ("mean", "var", "scale", "bias"))
  return (y - mean) / jnp.sqrt(var + 1e-3) * scale + bias


def convolved(x: jax.Array, kernel: jax.Array, padding: Any = "SAME", **settings: Any) -> jax.Array:
  """Returns a convolution with channels last, over 1 to 3 axes."""
  letters = "DHW"[3 - (x.ndim - 2) :]
  spec = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
  strides = settings.pop("strides", (1,) * (x.ndim - 2))
  return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=spec, **settings)


class ResNet(nn.Module):
  """A stem and two bottlenecks, as in the examples of Flax."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(Norm()(Conv(8, (7, 7), (2, 2), padding=[(3, 3), (3, 3)])(x)))
    x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
    for stride in (1, 2):
      y = nn.relu(Norm()(Conv(4, (1, 1))(x)))
      y = nn.relu(Norm()(Conv(4, (3, 3), (stride, stride))(y)))
      y = Norm()(Conv(16, (1, 1))(y))
      x = nn.relu(y + Norm()(Conv(16, (1, 1), (stride, stride))(x)))
    return Dense(5)(jnp.mean(x, axis=(1, 2)))


class PreActivation(nn.Module):
  """A block whose norms stand before its convolutions."""

  @nn.compact
  def __call__(self, x):
    x = Conv(8, (3, 3))(x)
    y = Conv(8, (3, 3))(nn.relu(Norm()(x)))
    return x + Conv(8, (3, 3))(nn.relu(Norm()(y)))


class ConvNeXt(nn.Module):
  """Two blocks with layer norms and layer scales."""

  @nn.compact
  def __call__(self, x):
    x = nn.LayerNorm(**F64)(Conv(8, (4, 4), strides=(4, 4))(x))
    for _ in range(2):
      y = nn.Conv(8, (7, 7), feature_group_count=8, **F64)(x)
      y = Dense(8)(nn.gelu(Dense(16)(nn.LayerNorm(**F64)(y))))
      x = x + y * self.param(f"gamma{_}", nn.initializers.ones, (8,), jnp.float64)
    return Dense(5)(nn.LayerNorm(**F64)(x.mean((1, 2))))


class MobileNet(nn.Module):
  """Two inverted residuals with depthwise convolutions."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu6(Norm()(Conv(8, (3, 3), (2, 2))(x)))
    for stride in (1, 2):
      y = nn.relu6(Norm()(Conv(16, (1, 1))(x)))
      y = nn.relu6(Norm()(Conv(16, (3, 3), (stride, stride), feature_group_count=16)(y)))
      y = Norm()(Conv(8, (1, 1))(y))
      x = x + y if stride == 1 else y
    return x


class DiverseBranches(nn.Module):
  """The block of Ding et al., 2021: 3x3, 1x1, 1x1-3x3 and 1x1-average."""

  pad_first: bool

  @nn.compact
  def __call__(self, x):
    for features in (6, 8):
      same = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))) if self.pad_first else x
      padding = "VALID" if self.pad_first else "SAME"
      inner = Norm()(Conv(x.shape[-1], (1, 1))(same))
      y = Norm()(Conv(features, (3, 3))(x)) + Norm()(Conv(features, (1, 1))(x))
      y = y + Norm()(Conv(features, (3, 3), padding=padding)(inner))
      pooled = nn.avg_pool(Norm()(Conv(features, (1, 1))(same)), (3, 3), padding=padding)
      x = nn.relu(y + Norm()(pooled))
    return x


class Inception(nn.Module):
  """Branches of different depth that are concatenated."""

  @nn.compact
  def __call__(self, x):
    def conv(x, features, size):
      return Norm()(Conv(features, size)(x))

    x = nn.relu(conv(x, 8, (3, 3)))
    branches = [
      conv(x, 8, (1, 1)),
      conv(nn.relu(conv(x, 6, (1, 1))), 8, (5, 5)),
      conv(nn.avg_pool(x, (3, 3), (1, 1), padding="SAME"), 4, (1, 1)),
      conv(conv(x, 4, (1, 3)), 4, (3, 1)),
    ]
    return nn.relu(jnp.concatenate(branches, -1))


class SqueezeExcitation(nn.Module):
  """A branch block with a gate, and a norm after the gate."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(Norm()(Conv(8, (3, 3))(x)) + Norm()(Conv(8, (1, 1))(x)))
    y = Norm()(Conv(8, (3, 3))(x)) + Norm()(x)
    gate = nn.sigmoid(Dense(8)(nn.relu(Dense(4)(y.mean((1, 2), keepdims=True)))))
    return nn.relu(y * gate)


class EfficientNet(nn.Module):
  """Two inverted residuals with a gate, as EfficientNet has them."""

  @nn.compact
  def __call__(self, x):
    x = nn.silu(Norm()(Conv(8, (3, 3), (2, 2))(x)))
    for stride in (1, 2):
      y = nn.silu(Norm()(Conv(16, (1, 1))(x)))
      y = nn.silu(Norm()(Conv(16, (5, 5), (stride, stride), feature_group_count=16)(y)))
      gate = nn.silu(nn.Conv(4, (1, 1), **F64)(y.mean((1, 2), keepdims=True)))
      y = Norm()(Conv(8, (1, 1))(y * nn.sigmoid(nn.Conv(16, (1, 1), **F64)(gate))))
      x = x + y if stride == 1 else y
    return Dense(5)(nn.silu(Norm()(Conv(12, (1, 1))(x))).mean((1, 2)))


class UNet(nn.Module):
  """One level down and up again, with a transposed convolution and a concatenation."""

  @nn.compact
  def __call__(self, x):
    skip = nn.relu(Norm()(Conv(6, (3, 3))(x)))
    y = nn.max_pool(skip, (2, 2), (2, 2), padding="SAME")
    y = nn.relu(Norm()(Conv(8, (3, 3))(y)))
    y = Norm()(nn.ConvTranspose(6, (2, 2), (2, 2), use_bias=False, **F64)(y))
    y = y[:, : skip.shape[1], : skip.shape[2]]
    y = nn.relu(Norm()(Conv(6, (3, 3))(jnp.concatenate([skip, y], -1))))
    return nn.Conv(2, (1, 1), **F64)(y)


class ViT(nn.Module):
  """Patches, position embeddings and one block of attention."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(12, (4, 4), (4, 4), **F64)(x)
    x = x.reshape(x.shape[0], -1, 12)
    x = x + self.param("positions", nn.initializers.normal(), (1, x.shape[1], 12), jnp.float64)
    y = nn.LayerNorm(**F64)(x)
    x = x + nn.MultiHeadDotProductAttention(3, **F64)(y, y)
    y = Dense(12)(nn.gelu(Dense(24)(nn.LayerNorm(**F64)(x))))
    return Dense(5)(nn.LayerNorm(**F64)(x + y)[:, 0])


class ConvMixer(nn.Module):
  """Norms after activations. The first is read twice, so that it stays."""

  @nn.compact
  def __call__(self, x):
    x = Norm()(nn.gelu(nn.Conv(8, (2, 2), (2, 2), **F64)(x)))
    y = Norm()(nn.gelu(nn.Conv(8, (5, 5), feature_group_count=8, **F64)(x)))
    x = Norm()(nn.gelu(nn.Conv(8, (1, 1), **F64)(x + y)))
    return Dense(5)(x.mean((1, 2)))


class NnxBlock(nnx.Module):
  """A residual block of Flax NNX."""

  def __init__(self, rngs: nnx.Rngs):
    settings = {"use_bias": False, "rngs": rngs, **F64}
    self.first = nnx.Conv(3, 6, (3, 3), strides=2, **settings)
    self.norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs, **F64)
    self.second = nnx.Conv(3, 6, (1, 1), strides=2, **settings)
    self.other = nnx.BatchNorm(6, use_running_average=True, rngs=rngs, **F64)

  def __call__(self, x):
    return nnx.relu(self.norm(self.first(x))) + self.other(self.second(x))


def nnx_block() -> Net:
  """Returns a block of Flax NNX as a function of its state."""
  graph, state = nnx.split(nnx.eval_shape(lambda: NnxBlock(nnx.Rngs(0))))
  return Net(lambda state, x: nnx.merge(graph, state)(x), state, (2, 2))


def asymmetric(params, x):
  """Returns a sum of 3x3, 3x1 and 1x3 with channels first, as ACNet has it."""
  padding = {"square": ((1, 1), (1, 1)), "tall": ((1, 1), (0, 0)), "wide": ((0, 0), (1, 1))}
  return jax.nn.relu(
    sum(
      normalised(lax.conv_general_dilated(x, params[name], (1, 1), pads), params[f"norm_{name}"], 1)
      for name, pads in padding.items()
    )
  )


def low_rank(params, x):
  """Returns a dense layer with an adapter of low rank (LoRA)."""
  y = x @ params["kernel"] + (x @ params["down"]) @ params["up"] * 2.0
  return jax.nn.gelu(y + params["bias"])


def standardised(params, x):
  """Returns a convolution with standardised weights, after the norm of its input."""
  kernel = params["kernel"]
  mean, var = kernel.mean((0, 1, 2), keepdims=True), kernel.var((0, 1, 2), keepdims=True)
  kernel = (kernel - mean) / jnp.sqrt(var + 1e-6)
  y = convolved((x - params["mean"]) / params["var"], kernel, ((2, 2), (2, 2)))
  return jax.nn.relu(y * params["gain"] + params["bias"])


def dilated(params, x):
  """Returns a dilated convolution beside a dense one of the same reach, and the identity."""
  y = convolved(x, params["wide"], ((2, 2), (2, 2)), rhs_dilation=(2, 2))
  y = y + convolved(x, params["near"], ((2, 2), (2, 2))) + x
  return jax.nn.relu(normalised(y, params["norm"]))


def line(params, x):
  """Returns branches over one spatial axis."""
  x = x.reshape(x.shape[0], -1, 3)
  y = convolved(x, params["wide"]) + convolved(x, params["point"])
  return jax.nn.relu(normalised(y, params["norm"]))


def volume(params, x):
  """Returns branches over three spatial axes, grouped and depthwise."""
  x = jnp.stack([x, 2 * x, -x], 1)
  y = convolved(x, params["wide"], feature_group_count=3)
  y = y + convolved(x, params["point"], feature_group_count=3)
  return jax.nn.relu(normalised(y + x, params["norm"]))


def detector(params, x):
  """Returns a head that is shared by the maps of five levels."""
  results = []
  for level in range(5):
    y = jax.nn.relu(x[:, level:, level:])
    for layer in range(2):
      y = convolved(y, params[f"kernel{layer}"], ((1, 1), (1, 1)))
      y = jax.nn.relu(normalised(y, params[f"norm{layer}"]))
    results.append(convolved(y, params["out"], "VALID"))
  return results


def _norms(**sizes: int) -> dict[str, tuple[int, ...]]:
  return {name: (size,) for name, size in sizes.items()}


def nets() -> dict[str, Callable[[], Net]]:
  """Returns all networks by name, each as a function that makes it."""
  square = {"square": (6, 3, 3, 3), "tall": (6, 3, 3, 1), "wide": (6, 3, 1, 3)}
  kernels = {"kernel0": (3, 3, 3, 3), "kernel1": (3, 3, 3, 3), "out": (1, 1, 3, 4)}
  return {
    "resnet": lambda: linen(ResNet(), (10, 10)),
    "pre-activation": lambda: linen(PreActivation(), (3, 3), norms=1),
    "convnext": lambda: linen(ConvNeXt(), (8, 8)),
    "mobilenet": lambda: linen(MobileNet(), (7, 7)),
    "diverse branches, padded first": lambda: linen(DiverseBranches(True), (10, 2)),
    "diverse branches, padded between": lambda: linen(DiverseBranches(False), (10, 2)),
    "inception": lambda: linen(Inception(), (7, 7)),
    "squeeze and excitation": lambda: linen(SqueezeExcitation(), (5, 4)),
    # The last block has no activation, so that its projection and the head become one.
    "efficientnet": lambda: linen(EfficientNet(), (13, 12)),
    "u-net": lambda: linen(UNet(), (5, 5), also=True),
    # The patches of a size that 4 does not divide are padded, and all sizes have 16 of them.
    "vit": lambda: linen(
      ViT(), (10, 10), sizes=((2, 16, 16), (1, 14, 16), (2, 15, 13), (1, 13, 13))
    ),
    "convmixer": lambda: linen(ConvMixer(), (4, 4), norms=1),
    "nnx": nnx_block,
    "asymmetric": lambda: Net(
      asymmetric,
      shapes(**square, **_norms(norm_square=6, norm_tall=6, norm_wide=6)),
      (3, 1),
      lambda n, h, w: (n, 3, h, w),
    ),
    "low rank": lambda: Net(
      low_rank, shapes(kernel=(3, 8), down=(3, 2), up=(2, 8), bias=(8,)), (3, 1)
    ),
    "standardised": lambda: Net(
      standardised, shapes(kernel=(5, 5, 3, 4), mean=(3,), var=(3,), gain=(4,), bias=(4,)), (1, 1)
    ),
    "dilated": lambda: Net(
      dilated, shapes(wide=(3, 3, 3, 3), near=(5, 5, 3, 3), norm=(3,)), (2, 1)
    ),
    "line": lambda: Net(line, shapes(wide=(5, 3, 4), point=(1, 3, 4), norm=(4,)), (2, 1)),
    "volume": lambda: Net(
      volume, shapes(wide=(3, 3, 3, 1, 3), point=(1, 1, 1, 1, 3), norm=(3,)), (2, 1)
    ),
    "detector": lambda: Net(detector, shapes(**kernels, **_norms(norm0=3, norm1=3)), (15, 15)),
  }
