"""Roundings: which tensors of a file in QDQ form are rounded, and how.

`roundings_of` calibrates a graph and reads its roundings from the file that is made. A network then
learns with these roundings in JAX (`repjax.quantization.simulated`). `quantize_by` gives the same
roundings to the graph with the weights that were learned, and calibrates nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from repjax.errors import InputError
from repjax.onnx.translation import IMAGES
from repjax.quantization.graph import check_float, constants, layers_of
from repjax.quantization.qdq import in_qdq_form
from repjax.quantization.runtime import check_images, need_runtime


class Roundings(NamedTuple):
  """The rounding of a network: x becomes q = round(x / scale) + zero, and weights have 7 or 8 bits.

  Attributes:
    activations: "uint8" or "int8".
    weight_bits: 7 or 8.
    tensors: for the name of each rounded tensor, its scale, above 0, and the whole number that
      stands for 0.
    weights: for the name of each rounded kernel, True if all outputs share one scale.
    biases: names of rounded biases. Their scales follow from those of the input and the weights.
  """

  activations: str
  weight_bits: int
  tensors: Mapping[str, tuple[float, int]]
  weights: Mapping[str, bool]
  biases: Sequence[str] = ()


def roundings_of(
  proto: Any,
  images: np.ndarray,
  *,
  activations: str = "uint8",
  weight_bits: int = 7,
  calibration: str = "minmax",
) -> Roundings:
  """Returns the roundings that ONNX Runtime's quantizer chooses for a graph from images.

  Args:
    proto: from `repjax.onnx.to_onnx` in float32, without preprocessing.
    images: normalized images to calibrate with, (N, H, W, 3), otherwise as in `quantize`.
    activations: as in `quantize`.
    weight_bits: as in `quantize`.
    calibration: as in `quantize`.

  Raises:
    InputError: as in `quantize`.
  """
  need_runtime()
  check_float(proto)
  check_images(proto, images)
  file = in_qdq_form(
    proto,
    images,
    activations=activations,
    calibration=calibration,
    per_channel=True,
    weight_bits=weight_bits,
  )
  return Roundings(activations, weight_bits, *_read(file, proto))


def _read(file: Any, proto: Any) -> tuple[dict[str, tuple[float, int]], dict[str, bool], list[str]]:
  """Reads the rounded tensors, weights and biases from a file that was made of a graph.

  Activations pass a QuantizeLinear. Weights and biases are stored as whole numbers, and pass a
  DequantizeLinear only.
  """
  arrays, known = constants(file), constants(proto)
  tensors, weights, biases = {}, {}, []
  for node in file.graph.node:
    if node.op_type == "QuantizeLinear":
      scale, zero = (arrays[name] for name in node.input[1:3])
      # If a rounded tensor is an output of the graph, the quantizer renames the tensor before it.
      tensors[node.input[0].removesuffix("_QuantizeLinear_Input")] = (float(scale), int(zero))
    elif node.op_type == "DequantizeLinear" and node.input[0] in arrays:
      name = node.output[0].removesuffix("_DequantizeLinear_Output")
      if name in known and arrays[node.input[0]].dtype == np.int8:
        weights[name] = arrays[node.input[1]].size == 1
      elif name in known:  # biases are stored in 32 bits
        biases.append(name)
  return tensors, weights, biases


def missing_in(proto: Any, names: Iterable[str]) -> list[str]:
  """Returns the names that no tensor of a graph has."""
  have = {tensor for node in proto.graph.node for tensor in (*node.input, *node.output)}
  return [name for name in names if name not in have]


def quantize_by(proto: Any, roundings: Roundings) -> Any:
  """Returns a model in int8 with given roundings, such as those that a network learned with.

  Args:
    proto: graph of the network with the learned weights, in float32. It may have preprocessing.
    roundings: the roundings of the same network, see `repjax.quantization.simulated`.

  Returns:
    An `onnx.ModelProto` with the same input and output.

  Raises:
    InputError: the roundings belong to a different graph, or onnxruntime is not installed.
  """
  need_runtime()
  check_float(proto)
  form = proto.graph.input[0].type.tensor_type
  given, layers = dict(roundings.tensors), layers_of(proto)
  takes_bytes = form.elem_type == 2
  if takes_bytes and IMAGES in given:
    # The roundings are of normalized images, which this graph computes from bytes.
    given[_normalized(proto)] = given.pop(IMAGES)
  if missing := missing_in(proto, (*given, *roundings.weights)):
    raise InputError(
      f"these roundings are not of this graph, which has no {missing[0]}. Take those that "
      "repjax.quantization.roundings_of gives for the same network"
    )
  size = [axis.dim_value for axis in form.shape.dim[2:]]
  return in_qdq_form(
    proto,
    # The quantizer wants images, although every range is given.
    np.zeros((1, *size, 3), np.uint8 if takes_bytes else np.float32),
    activations=roundings.activations,
    calibration="minmax",
    per_channel=True,
    weight_bits=roundings.weight_bits,
    but=[layer.name for layer in layers if layer.weight not in roundings.weights],
    scales=given,
  )


def _normalized(proto: Any) -> str:
  """Returns the tensor of the normalized images in a graph that takes uint8.

  Normalization is a chain from the input of operators whose other operands are known.
  """
  known, tensor = {constant.name for constant in proto.graph.initializer}, IMAGES
  while True:
    readers = [node for node in proto.graph.node if tensor in node.input]
    others = {name for node in readers for name in node.input} - {tensor} - known
    if len(readers) != 1 or readers[0].op_type not in ("Cast", "Mul", "Add", "Sub") or others:
      return tensor
    tensor = readers[0].output[0]
