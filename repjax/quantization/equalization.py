"""Cross-layer equalization: channels between two layers rescaled so that 8 bits suit them.

It works on the ONNX graph, which says who reads whom; a tree of parameters does not.
"""

from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from repjax.algebra import ConvParams, equalizing_scale, rescale_between
from repjax.errors import unknown
from repjax.quantization.finite import check_finite
from repjax.quantization.graph import Layer, constants, layers_of, with_constants
from repjax.quantization.runtime import observed

_BETWEEN = ("Relu", "MaxPool", "AveragePool", "GlobalAveragePool")
"""What gives s f(x) for s x where s > 0, channel by channel. Flatten does, behind a mean."""

EQUALIZATIONS = ("none", "weights", "activations")
ROUNDS = 20
ENOUGH = 32
"""Of N images: ranges are at least ENOUGH / N of their tensor's largest value. On few images a
channel that is seen seldom looks small; blown up to the whole range it would be cut off on others.
"""


class Pair(NamedTuple):
  """Two layers of which the second reads the first, channel by channel.

  Attributes:
    first: a layer.
    second: a layer.
    between: the tensor that the second reads.
  """

  first: Layer
  second: Layer
  between: str


def pairs_of(proto: Any) -> list[Pair]:
  """Pairs of layers whose channels may be rescaled: nobody else reads what lies between them."""
  layers = {layer.result: layer for layer in layers_of(proto)}
  shared = Counter(name for layer in layers.values() for name in (layer.weight, layer.bias))
  readers = Counter(tensor for node in proto.graph.node for tensor in node.input)
  readers.update(output.name for output in proto.graph.output)
  makers = {node.output[0]: node for node in proto.graph.node}

  def origin(tensor: str) -> Layer | None:
    """The layer whose channels a tensor holds, if nobody else reads them on the way."""
    if readers[tensor] != 1:
      return None
    node = makers.get(tensor)
    if tensor in layers or node is None:
      return layers.get(tensor)
    above = makers.get(node.input[0])
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
    and "MatMul" not in (pair.first.op, pair.second.op)
    and all(shared[n] == 1 for n in (pair.first.weight, pair.first.bias, pair.second.weight))
  ]


def equalized_by(how: str, proto: Any, images: np.ndarray) -> Any:
  """A model equalized in one of the ways in EQUALIZATIONS.

  Raises:
    InputError: there is no such way, or values that are not finite.
  """
  if how not in EQUALIZATIONS:
    raise unknown("equalization", how, EQUALIZATIONS)
  if how == "none":
    return proto
  return equalized(proto, images if how == "activations" else None)


def equalized(proto: Any, images: np.ndarray | None = None) -> Any:
  """A model that computes the same, with channels between layers rescaled.

  Args:
    proto: in float32.
    images: (N, H, W, 3), to give channels the ranges that they take on these, against those of the
      weights that read them (SmoothQuant); those of few are not trusted, see ENOUGH. None: those of
      the weights on both sides, again and again until nothing changes (Nagel et al.), which needs
      no data.

  Returns:
    A model with other weights and biases in the same nodes.

  Raises:
    InputError: a layer gives values that are not finite.
  """
  pairs = pairs_of(proto)
  arrays = constants(proto)
  seen = _largest(proto, [pair.between for pair in pairs], images) if images is not None else {}
  for _ in range(1 if seen else ROUNDS):
    change = 0.0
    for pair in pairs:
      first, second = _conv(arrays, pair.first), _conv(arrays, pair.second)
      ranges = seen.get(pair.between, np.abs(first.kernel).max((0, 1, 2)))
      first, second, moved = _exchanged(first, second, ranges)
      arrays |= _arrays(pair.first, first) | _arrays(pair.second, second)
      change = max(change, float(moved))
    if change < 1e-3:
      break
  return with_constants(proto, arrays)


@jax.jit  # else each of its operations would be compiled for each shape
def _exchanged(
  first: ConvParams, second: ConvParams, ranges: Any
) -> tuple[ConvParams, ConvParams, jax.Array]:
  """Two convolutions with the channels between them rescaled, and the largest |log(scale)|.

  Args:
    first: kernel (H, W, I/g, C), bias (C,).
    second: kernel (H, W, C/g, O), bias (O,).
    ranges: (C,), as in `equalizing_scale`.
  """
  scale = equalizing_scale(ranges, second.kernel)
  return *rescale_between(first, second, scale), jnp.abs(jnp.log(scale)).max()


def _largest(proto: Any, tensors: list[str], images: np.ndarray) -> dict[str, np.ndarray]:
  """The largest absolute value of each channel of some tensors, with a floor, see ENOUGH."""
  found: dict[str, np.ndarray] = {}
  for batch in observed(proto, tensors, images):
    for tensor, maps in zip(tensors, batch):
      largest = np.abs(maps).max(tuple(axis for axis in range(maps.ndim) if axis != 1))
      found[tensor] = np.maximum(found[tensor], largest) if tensor in found else largest
  check_finite(proto, images, found.values())
  floor = min(1.0, ENOUGH / len(images))
  return {tensor: np.maximum(seen, floor * seen.max()) for tensor, seen in found.items()}


def _conv(arrays: dict[str, Any], layer: Layer) -> ConvParams:
  """A layer's numbers as the algebra has them."""
  weight = arrays[layer.weight]
  kernel = weight.transpose(2, 3, 1, 0) if layer.op == "Conv" else weight[None, None]
  bias: Any = arrays[layer.bias] if layer.bias else np.zeros(kernel.shape[-1:], kernel.dtype)
  return ConvParams(kernel, bias)


def _arrays(layer: Layer, conv: ConvParams) -> dict[str, np.ndarray]:
  """The way back."""
  kernel = np.asarray(conv.kernel)
  weight = kernel.transpose(3, 2, 0, 1) if layer.op == "Conv" else kernel[0, 0]
  return {layer.weight: weight} | ({layer.bias: np.asarray(conv.bias)} if layer.bias else {})
