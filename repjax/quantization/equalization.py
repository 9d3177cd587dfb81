"""Cross-layer equalization: rescales the channels between two layers so that 8 bits suit them.

A ReLU, a pool and a mean pass a positive factor on: f(s x) = s f(x). If the first layer's weights
for a channel are divided by s, and the second layer's multiplied by s, the two layers compute the
same. Their rounding changes: with one scale for a whole tensor, a channel of small values is
rounded coarsely. The best s gives a channel the same range on both sides.

  channel ranges 8 and 0.5 before; with s = (4, 0.25) both ranges are 2

The work is done on the ONNX graph, which says which layer reads which. A tree of parameters does
not say so.
"""

from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from repjax.algebra import ConvParams, wide_dtype
from repjax.errors import unknown
from repjax.quantization.graph import GraphLayer, constants, layers_of, with_constants
from repjax.quantization.runtime import check_finite, observed

_BETWEEN = ("Relu", "MaxPool", "AveragePool", "GlobalAveragePool")
"""Operators f with s f(x) = f(s x) for s > 0 in each channel. Flatten is one after a mean."""

EQUALIZATIONS = ("none", "weights", "activations")
ROUNDS = 20
ENOUGH = 32
"""On N images, ranges are at least ENOUGH / N of their tensor's largest value. A channel that is
seldom active looks small on few images. Scaled up to the whole range, it would be cut off on more.
"""

OUTLIER = 64
"""A range above OUTLIER times the median says nothing about what other channels may reach."""

BIAS_SHARE = 16
"""A bias divided by BIAS_SHARE is the smallest range that a channel of weights is given. Biases and
kernels of folded networks are of one size, so this concerns only a kernel that has decayed.
"""


class Pair(NamedTuple):
  """Two layers, the second of which reads the first, channel by channel.

  Attributes:
    first: the layer whose outputs are rescaled.
    second: the layer whose inputs are rescaled.
    between: the tensor that the second layer reads.
  """

  first: GraphLayer
  second: GraphLayer
  between: str


def rescale_between(
  first: ConvParams, second: ConvParams, scale: jax.Array
) -> tuple[ConvParams, ConvParams]:
  """Rescales the channels between two convolutions, and leaves unchanged what the two compute.

  K1'[..., c] = K1[..., c] / scale[c];  b1'[c] = b1[c] / scale[c];  K2'[..., c, :] = scale[c] K2.
  Exact where the function f in between has f(s x) = s f(x) for s > 0 in each channel: none, ReLU,
  pooling, padding with zeros.

  Args:
    first: kernel (H, W, I/g, C), bias (C,).
    second: kernel (H, W, C/g, O), bias (O,).
    scale: (C,), above 0.

  Returns:
    Both convolutions, in the widest dtype involved, at least float32.

  Raises:
    ValueError: the channels between the two do not match.

  References:
    Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction, ICCV 2019,
      section 4.1. https://arxiv.org/abs/1906.04721
  """
  dtype = wide_dtype(*(jnp.asarray(array).dtype for array in (*first, *second, scale)))
  k1, b1, k2, b2, scale = (jnp.asarray(array, dtype) for array in (*first, *second, scale))
  scales = _by_group(scale, k2)  # (g, C/g)
  grouped = k2.reshape(*k2.shape[:3], len(scales), -1)  # (H, W, C/g, g, O/g)
  grouped = grouped * scales.T[None, None, :, :, None]
  k1 = k1 / scale[None, None, None, :]
  return ConvParams(k1, b1 / scale), ConvParams(grouped.reshape(k2.shape), b2)


def equalizing_scale(ranges: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns the scale with which `rescale_between` gives a channel one range on both of its sides.

  scale[c] = sqrt(ranges[c] / max|K2[..., c, :]|), and 1 where either is 0: a dead channel.

  Args:
    ranges: (C,), at least 0: max|K1[..., c]| of the first kernel, or the largest value that the
      channel was seen to take.
    kernel: (H, W, C/g, O) of the second convolution.

  Returns:
    (C,), in the widest dtype involved, at least float32.

  Raises:
    ValueError: the channels do not match.

  References:
    Nagel et al., ICCV 2019, equation 11, for weights. https://arxiv.org/abs/1906.04721
    Xiao et al., SmoothQuant, ICML 2023, equation 4, for activations. https://arxiv.org/abs/2211.10438
  """
  dtype = wide_dtype(jnp.asarray(ranges).dtype, jnp.asarray(kernel).dtype)
  ranges, kernel = jnp.asarray(ranges, dtype), jnp.asarray(kernel, dtype)
  groups = _by_group(ranges, kernel).shape[0]
  grouped = kernel.reshape(*kernel.shape[:3], groups, -1)  # (H, W, C/g, g, O/g)
  inputs = jnp.abs(grouped).max((0, 1, 4)).T.reshape(ranges.shape)
  alive = (ranges > 0) & (inputs > 0)
  # The quotient of the roots is finite where the quotient itself overflows.
  return jnp.sqrt(jnp.where(alive, ranges, 1)) / jnp.sqrt(jnp.where(alive, inputs, 1))


def _by_group(channels: jax.Array, kernel: jax.Array) -> jax.Array:
  """Reshapes (C,) to (g, C/g), the channels that each group of a kernel (H, W, C/g, O) reads."""
  count, width, outputs = channels.shape[0], *kernel.shape[2:]
  if not width or count % width or outputs % (count // width):
    raise ValueError(
      f"a kernel {kernel.shape} cannot follow {count} channels: it reads {width} of them a group"
    )
  return channels.reshape(-1, width)


def pairs_of(proto: Any) -> list[Pair]:
  """Returns the pairs of layers whose channels may be rescaled.

  Nothing else may read the tensors between the two layers, and nothing else may use their weights.
  """
  layers = {layer.result: layer for layer in layers_of(proto)}
  uses = Counter(name for layer in layers.values() for name in (layer.weight, layer.bias))
  readers = Counter(tensor for node in proto.graph.node for tensor in node.input)
  readers.update(output.name for output in proto.graph.output)
  makers = {node.output[0]: node for node in proto.graph.node}

  def origin(tensor: str) -> GraphLayer | None:
    """Returns the layer whose channels a tensor holds, if nothing else reads them on the way."""
    if readers[tensor] != 1:
      return None
    node = makers.get(tensor)
    if tensor in layers or node is None:
      return layers.get(tensor)
    above = makers.get(node.input[0])
    # Flatten keeps channels apart only where each has one pixel left.
    is_mean = above is not None and above.op_type == "GlobalAveragePool"
    passes = node.op_type in _BETWEEN or (node.op_type == "Flatten" and is_mean)
    return origin(node.input[0]) if passes else None

  found = [
    Pair(first, layer, layer.source) for layer in layers.values() if (first := origin(layer.source))
  ]
  return [
    pair
    for pair in found
    if pair.first.bias
    # A MatMul has batched matrices, which are not one matrix from channels to channels.
    and "MatMul" not in (pair.first.op, pair.second.op)
    and all(uses[n] == 1 for n in (pair.first.weight, pair.first.bias, pair.second.weight))
  ]


def ranges_of(conv: ConvParams) -> np.ndarray:
  """Returns the range of each output channel of a convolution, for `equalizing_scale`.

  range[c] = max(max|K[..., c]|, |b[c]| / BIAS_SHARE). If a kernel has decayed to almost nothing,
  its own range would scale the channel up until the bias is far above all values of other channels.
  The scale of the tensor in between would then have no steps left for these.

  A ReLU makes a channel with a very negative bias zero. Such a bias counts no more than the largest
  kernel. Otherwise the weights that read the channel would grow above all other weights.
  """
  kernels, biases = np.abs(conv.kernel).max((0, 1, 2)), conv.bias / BIAS_SHARE
  return np.maximum(kernels, np.where(biases > 0, biases, np.minimum(-biases, kernels.max())))


def equalized_by(how: str, proto: Any, images: np.ndarray) -> Any:
  """Returns a model equalized in one of the ways in EQUALIZATIONS.

  Raises:
    InputError: `how` is unknown, or a layer gives values that are not finite.
  """
  if how not in EQUALIZATIONS:
    raise unknown("equalization", how, EQUALIZATIONS)
  if how == "none":
    return proto
  return equalized(proto, images if how == "activations" else None)


def equalized(proto: Any, images: np.ndarray | None = None) -> Any:
  """Returns a model that computes the same, with channels between layers rescaled.

  Args:
    proto: a graph in float32.
    images: (N, H, W, 3). A channel's range is then the largest value that it takes on these images,
      against the range of the weights that read it (SmoothQuant). Ranges on few images are not
      trusted, see ENOUGH. None: the ranges of the weights on both sides, repeated until nothing
      changes (Nagel et al.), which needs no data.

  Returns:
    A model with the same nodes, and new weights and biases.

  Raises:
    InputError: a layer gives values that are not finite.
  """
  pairs = pairs_of(proto)
  arrays = constants(proto)
  seen = _largest(proto, [pair.between for pair in pairs], images) if images is not None else {}
  # Rescaling one pair changes the weights of the next pair, so that weights take several rounds.
  for _ in range(1 if seen else ROUNDS):
    change = 0.0
    for pair in pairs:
      first, second = _conv(arrays, pair.first), _conv(arrays, pair.second)
      ranges = seen.get(pair.between, ranges_of(first))
      first, second, moved = _exchanged(first, second, ranges)
      arrays |= _arrays(pair.first, first) | _arrays(pair.second, second)
      change = max(change, float(moved))
    if change < 1e-3:
      break
  return with_constants(proto, arrays)


@jax.jit  # without jit, each of its operations would be compiled for each shape
def _exchanged(
  first: ConvParams, second: ConvParams, ranges: Any
) -> tuple[ConvParams, ConvParams, jax.Array]:
  """Equalizes the channels between two convolutions, and returns the largest |log(scale)| too.

  Args:
    first: kernel (H, W, I/g, C), bias (C,).
    second: kernel (H, W, C/g, O), bias (O,).
    ranges: (C,), as in `equalizing_scale`.
  """
  scale = equalizing_scale(ranges, second.kernel)
  return *rescale_between(first, second, scale), jnp.abs(jnp.log(scale)).max()


def _largest(proto: Any, tensors: list[str], images: np.ndarray) -> dict[str, np.ndarray]:
  """Returns the largest absolute value of each channel of tensors, with a floor, see ENOUGH."""
  found: dict[str, np.ndarray] = {}
  for batch in observed(proto, tensors, images):
    for tensor, maps in zip(tensors, batch):
      largest = np.abs(maps).max(tuple(axis for axis in range(maps.ndim) if axis != 1))
      found[tensor] = np.maximum(found[tensor], largest) if tensor in found else largest
  check_finite(proto, images, found.values())
  share = min(1.0, ENOUGH / len(images))
  return {tensor: np.maximum(seen, share * _usual(seen)) for tensor, seen in found.items()}


def _usual(ranges: np.ndarray) -> float:
  """Returns the largest of some ranges, without single ones that are far above the rest."""
  alive = ranges[ranges > 0]
  return min(float(alive.max()), OUTLIER * float(np.median(alive))) if alive.size else 0.0


def _conv(arrays: dict[str, Any], layer: GraphLayer) -> ConvParams:
  """Returns a layer's weights and bias in the layout of the algebra."""
  weight = arrays[layer.weight]
  kernel = weight.transpose(2, 3, 1, 0) if layer.op == "Conv" else weight[None, None]
  bias: Any = arrays[layer.bias] if layer.bias else np.zeros(kernel.shape[-1:], kernel.dtype)
  return ConvParams(kernel, bias)


def _arrays(layer: GraphLayer, conv: ConvParams) -> dict[str, np.ndarray]:
  """Returns a layer's weights and bias in the layout of the graph, by name."""
  kernel = np.asarray(conv.kernel)
  weight = kernel.transpose(3, 2, 0, 1) if layer.op == "Conv" else kernel[0, 0]
  return {layer.weight: weight} | ({layer.bias: np.asarray(conv.bias)} if layer.bias else {})
