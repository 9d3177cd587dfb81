"""What a file in QDQ form rounds, and how: read from one, kept, and given to another."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from repjax.errors import InputError
from repjax.onnx.translation import IMAGES
from repjax.quantization.graph import check_float, constants, layers_of
from repjax.quantization.runtime import check_images, in_qdq_form, need_runtime


class Roundings(NamedTuple):
  """How a network is rounded: x becomes q = round(x / scale) + zero, and weights have 7 or 8 bits.

  Attributes:
    activations: "uint8" or "int8".
    weight_bits: 7 or 8.
    tensors: name of a tensor in the file to its scale, above 0, and the whole number that is 0.
    weights: name of weights to whether all have one scale, instead of one for each output.
    biases: names of biases, whose scales follow from those of what is multiplied.
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
  """What ONNX Runtime's quantizer rounds in a graph, by the values seen.

  Args:
    proto: from `repjax.onnx.to_onnx` in float32, without preprocessing.
    images: to calibrate with, normalized (N, H, W, 3), and else as in `quantize`.
    activations: as there, and so are `weight_bits` and `calibration`.

  Raises:
    InputError: as there.
  """
  need_runtime()
  check_float(proto)
  check_images(proto, images)
  settings = {"activations": activations, "weight_bits": weight_bits, "per_channel": True}
  return _read(in_qdq_form(proto, images, calibration=calibration, **settings), proto, settings)


def _read(file: Any, proto: Any, settings: Mapping[str, Any]) -> Roundings:
  """What a file rounds that was made of a graph in float32."""
  arrays, known = constants(file), constants(proto)
  tensors, weights, biases = {}, {}, []
  for node in file.graph.node:
    if node.op_type == "QuantizeLinear":
      scale, zero = (arrays[name] for name in node.input[1:3])
      # Where an output of the graph is rounded, what is rounded has another name than it.
      tensors[node.input[0].removesuffix("_QuantizeLinear_Input")] = (float(scale), int(zero))
    elif node.op_type == "DequantizeLinear" and node.input[0] in arrays:
      name = node.output[0].removesuffix("_DequantizeLinear_Output")
      if name in known and arrays[node.input[0]].dtype == np.int8:
        weights[name] = arrays[node.input[1]].size == 1
      elif name in known:
        biases.append(name)
  return Roundings(settings["activations"], settings["weight_bits"], tensors, weights, biases)


def missing_in(proto: Any, names: Iterable[str]) -> list[str]:
  """The names that no tensor of a graph has."""
  have = {tensor for node in proto.graph.node for tensor in (*node.input, *node.output)}
  return [name for name in names if name not in have]


def quantize_by(proto: Any, roundings: Roundings) -> Any:
  """A model in int8 that rounds as a network has learned to, see `repjax.quantization.simulated`.

  Args:
    proto: of that network with what it has learned, in float32; with preprocessing too.
    roundings: that it has learned with.

  Returns:
    An `onnx.ModelProto` with the same input and output.

  Raises:
    InputError: they are not of this graph, or onnxruntime is missing.
  """
  need_runtime()
  check_float(proto)
  form = proto.graph.input[0].type.tensor_type
  given, layers = dict(roundings.tensors), layers_of(proto)
  takes_bytes = form.elem_type == 2
  if takes_bytes and IMAGES in given:
    given[_normalized(proto)] = given.pop(IMAGES)
  if missing := missing_in(proto, (*given, *roundings.weights)):
    raise InputError(
      f"these roundings are not of this graph, which has no {missing[0]}: take those that "
      "repjax.quantization.roundings_of gives for the same network"
    )
  size = [axis.dim_value for axis in form.shape.dim[2:]]
  return in_qdq_form(
    proto,
    np.zeros((1, *size, 3), np.uint8 if takes_bytes else np.float32),  # all ranges are given
    activations=roundings.activations,
    calibration="minmax",
    per_channel=True,
    weight_bits=roundings.weight_bits,
    but=[layer.name for layer in layers if layer.weight not in roundings.weights],
    scales=given,
  )


def _normalized(proto: Any) -> str:
  """The tensor of the normalized images in a graph that takes uint8: known numbers made them."""
  known, tensor = {constant.name for constant in proto.graph.initializer}, IMAGES
  while True:
    readers = [node for node in proto.graph.node if tensor in node.input]
    others = {name for node in readers for name in node.input} - {tensor} - known
    if len(readers) != 1 or readers[0].op_type not in ("Cast", "Mul", "Add", "Sub") or others:
      return tensor
    tensor = readers[0].output[0]
