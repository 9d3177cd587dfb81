"""8 bits: post-training quantization of a deploy form, as an ONNX file.

`quantize_weights` keeps weights in int8 and computes in float32; `quantize` has ONNX Runtime's own
quantizer put QuantizeLinear and DequantizeLinear around all layers. Both take what `to_onnx` made
in float32: that graph says which layer reads which, and its names are Flax's scopes.

What is ours: weights in 8 bits as a pure function (`weights`), rescaling channels between layers
(`equalization`, with the laws in `repjax.algebra`), moving biases (`correction`), which layers it
hurts (`sensitivity`), and the same in JAX with gradients (`roundings`, `simulation`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from repjax.errors import InputError, unknown
from repjax.onnx.proto import need_onnx
from repjax.quantization.correction import corrected
from repjax.quantization.equalization import equalized_by
from repjax.quantization.graph import check_float, constants, copied, layers_of
from repjax.quantization.roundings import Roundings, quantize_by, roundings_of
from repjax.quantization.runtime import check_images, check_settings, in_qdq_form
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
  """A model in full int8, in QDQ form, by ONNX Runtime's quantizer.

  Args:
    proto: from `repjax.onnx.to_onnx` in float32.
    images: to calibrate with, (N, H, W, 3): uint8, or what the graph takes. Some hundred of the
      training split, as evaluation prepares them.
    activations: "uint8", with a zero point, for CPUs: all 256 levels are used behind a ReLU. Or
      "int8", symmetric, for TensorRT: only what layers read is rounded, biases stay in float.
    calibration: how ranges follow from the values seen: "minmax", "entropy" or "percentile" (the
      0.01 % that are farthest out are cut off).
    per_channel: one scale for each output channel of a kernel, instead of one for all.
    weight_bits: 7 or 8. x86 CPUs without VNNI add two products of uint8 and int8 in 16 bits, where
      those of 8 bits do not fit: ONNX Runtime then computes wrong sums, and no error says so. 8
      is for CPUs that have it (from 2019 and later servers on), and for GPUs.
    equalize: rescale channels between layers first: by the ranges of "weights" (cross-layer
      equalization), of "activations" (SmoothQuant), or "none".
    correct_bias: move biases so that rounded weights change no mean.
    float_layers: scopes or nodes of layers, as `sensitivity` gives them, that stay in float32.

  Returns:
    An `onnx.ModelProto` with the same input and output.

  Raises:
    InputError: onnx or onnxruntime is missing, the graph is not in float32, images that it does
      not take or none, or an unknown setting or node.

  References:
    Nagel et al., Data-Free Quantization, ICCV 2019. https://arxiv.org/abs/1906.04721

  Example:
    proto = repjax.onnx.to_onnx(model, variables, image_size=224)
    onnx.save(repjax.quantization.quantize(proto, images), "a0-int8.onnx")
  """
  check_float(proto)
  check_images(proto, images)
  check_settings(activations, calibration, weight_bits)
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
  """The nodes of layers that are given by their scopes or nodes."""
  layers = layers_of(proto)
  nodes = {key: layer.name for layer in layers for key in (layer.name, layer.title)}
  for name in float_layers:
    if name not in nodes:
      raise unknown("layer", name, [layer.title for layer in layers])
  found = list(dict.fromkeys(nodes[name] for name in float_layers))
  if len(found) == len(layers):
    raise InputError(f"all {len(layers)} layers are to stay in float; leave fewer of them")
  return found


def quantize_weights(proto: Any, images: np.ndarray | None = None) -> Any:
  """A model whose weights are int8 with a scale for each output channel, computing in float32.

  A DequantizeLinear stands in front of each layer. The file is a quarter as large and no faster: in
  ONNX Runtime as fast as before with the session's "session.disable_quant_qdq" set to "1", without
  which it unpacks the weights in every call and computes a Gemm of them in 8 bits.

  Args:
    proto: from `repjax.onnx.to_onnx` in float32.
    images: to correct biases with, as in `quantize`; None: they stay what they are.

  Returns:
    An `onnx.ModelProto` with the same input and output.

  Raises:
    InputError: onnx is missing, or with images onnxruntime, the graph is not in float32, or images
      that it does not take.
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
