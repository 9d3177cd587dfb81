"""8 bits: quantization of a deploy form, after training and in training.

A deploy form becomes an ONNX graph in float32 (`repjax.onnx.to_onnx`). The graph says which layer
reads which, and its names are Flax's scopes. Three functions take the graph:

  quantize_weights   int8 weights, computation in float32: a quarter of the size
  quantize           int8 throughout, by ONNX Runtime's quantizer, from calibration images
  sensitivity        the error of each layer alone, to choose layers that stay in float

Before quantizing, channels are rescaled between layers, so that rounding is finer (`equalization`),
and biases make up for what the rounding of weights moves (`correction`). For training with 8 bits,
`roundings_of` chooses scales, `simulated` computes the int8 file in JAX with gradients, and
`quantize_by` writes the file with what was learned. `round_weights` rounds a tree of parameters.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from repjax.errors import InputError, unknown
from repjax.onnx.proto import need_onnx
from repjax.quantization.correction import corrected
from repjax.quantization.equalization import equalized_by
from repjax.quantization.graph import check_float, constants, copied, layers_of
from repjax.quantization.qdq import check_choices, in_qdq_form
from repjax.quantization.roundings import Roundings, quantize_by, roundings_of
from repjax.quantization.runtime import check_images
from repjax.quantization.sensitivity import Sensitivity, sensitivity
from repjax.quantization.simulation import simulated
from repjax.quantization.weights import quantized, round_weights

__all__ = [
  "Roundings",
  "Sensitivity",
  "quantize",
  "quantize_by",
  "quantize_weights",
  "round_weights",
  "roundings_of",
  "sensitivity",
  "simulated",
]


def quantize(
  proto: Any,
  images: np.ndarray,
  *,
  activations: str = "uint8",
  calibration: str = "minmax",
  per_channel: bool = True,
  weight_bits: int = 7,
  equalize: str = "activations",
  correct_bias: bool = True,
  float_layers: Sequence[str] = (),
) -> Any:
  """Returns a model in int8, in QDQ form, made by ONNX Runtime's quantizer.

  Args:
    proto: from `repjax.onnx.to_onnx` in float32.
    images: images to calibrate with, (N, H, W, 3), in the dtype that the graph takes. Use some
      hundred images of the training split, prepared as for evaluation.
    activations: "uint8" has a zero point, and is for CPUs: all 256 levels are used after a ReLU.
      "int8" is symmetric, and is for TensorRT: only what layers read is rounded, and biases stay in
      float.
    calibration: how ranges follow from the values seen: "minmax", "entropy" or "percentile", which
      cuts off the 0.01 % that are farthest out.
    per_channel: one scale for each output channel of a kernel, instead of one for all.
    weight_bits: 7 or 8. x86 CPUs without VNNI add two products of uint8 and int8 in 16 bits, where
      products of 8-bit weights do not fit. ONNX Runtime then computes wrong sums, and no error says
      so. 8 is for CPUs with VNNI (servers from 2019 on), and for GPUs.
    equalize: how channels are rescaled between layers first: by the ranges of "weights"
      (cross-layer equalization), by those of "activations" (SmoothQuant), or "none".
    correct_bias: move biases so that rounded weights change no mean.
    float_layers: scopes or nodes of layers that stay in float32, as `sensitivity` names them.

  Returns:
    An `onnx.ModelProto` with the same input and output.

  Raises:
    InputError: onnx or onnxruntime is not installed, the graph is not in float32, the graph does
      not take the images, or a choice or a layer is unknown.

  References:
    Nagel et al., Data-Free Quantization, ICCV 2019. https://arxiv.org/abs/1906.04721

  Example:
    proto = repjax.onnx.to_onnx(model, variables, image_size=224)
    onnx.save(repjax.quantization.quantize(proto, images), "a0-int8.onnx")
  """
  check_float(proto)
  check_images(proto, images)
  check_choices(activations, calibration, weight_bits)
  float_layers = _nodes(proto, float_layers)
  proto = equalized_by(equalize, proto, images)
  if correct_bias:
    rounding: dict[str, Any] = {"per_channel": per_channel, "but": float_layers}
    proto = corrected(proto, images, weight_bits, **rounding)
  return in_qdq_form(
    proto,
    images,
    activations=activations,
    calibration=calibration,
    per_channel=per_channel,
    weight_bits=weight_bits,
    but=float_layers,
  )


def _nodes(proto: Any, float_layers: Sequence[str]) -> list[str]:
  """Returns the nodes of layers that are given by their scopes or nodes."""
  layers = layers_of(proto)
  nodes = {key: layer.name for layer in layers for key in (layer.name, layer.title)}
  for name in float_layers:
    if name not in nodes:
      raise unknown("layer", name, [layer.title for layer in layers])
  found = list(dict.fromkeys(nodes[name] for name in float_layers))
  if len(found) == len(layers):
    raise InputError(f"all {len(layers)} layers are to stay in float. Leave fewer of them")
  return found


def quantize_weights(proto: Any, images: np.ndarray | None = None) -> Any:
  """Returns a model with int8 weights, one scale for each output channel, computing in float32.

  A DequantizeLinear stands in front of each layer. The file is a quarter as large, and no faster.
  Set the session's "session.disable_quant_qdq" to "1" in ONNX Runtime, and it is as fast as before.
  Otherwise ONNX Runtime unpacks the weights in every call, and computes a Gemm of them in 8 bits.

  Args:
    proto: from `repjax.onnx.to_onnx` in float32.
    images: images to correct biases with, as in `quantize`. None: biases stay as they are.

  Returns:
    An `onnx.ModelProto` with the same input and output.

  Raises:
    InputError: onnx, or with images onnxruntime, is not installed, the graph is not in float32, or
      the graph does not take the images.
  """
  onnx = need_onnx()
  check_float(proto)
  if images is not None:
    check_images(proto, images)
    proto = corrected(proto, images)
  arrays, made = constants(proto), copied(proto)
  axes = {layer.weight: layer for layer in layers_of(proto)}
  kept = [tensor for tensor in made.graph.initializer if tensor.name not in axes]
  nodes = list(made.graph.node)
  # The DequantizeLinear nodes come first, since a file's nodes stand in the order of computation.
  del made.graph.initializer[:], made.graph.node[:]
  made.graph.initializer.extend(kept)
  for name, layer in axes.items():
    rank = arrays[name].ndim
    whole, scale = quantized(arrays[name], layer.inputs(rank))
    scales = np.reshape(scale, -1 if np.size(scale) > 1 else ())
    parts = {f"{name}/int8": whole, f"{name}/scale": scales}
    parts[f"{name}/zero"] = np.zeros(scales.shape, np.int8)
    for part, array in parts.items():
      made.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), part))
    attributes = {"name": f"{name}/DequantizeLinear", "axis": layer.axis % rank}
    node = onnx.helper.make_node("DequantizeLinear", list(parts), [name], **attributes)
    made.graph.node.append(node)
  made.graph.node.extend(nodes)
  return made
