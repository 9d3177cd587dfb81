"""ONNX Runtime's quantizer: makes a file in QDQ form of a graph in float32.

QDQ form says what is rounded, and leaves the arithmetic to the runtime. Each rounded tensor passes
a QuantizeLinear, which makes whole numbers of it, and a DequantizeLinear, which makes floats again:

  x -> QuantizeLinear(scale, zero) -> DequantizeLinear(scale, zero) -> Conv -> ...

A runtime fuses a layer with the pairs around it, and computes it on whole numbers. The scales come
from a calibration: the ranges that tensors take on some images.
"""

import contextlib
import importlib
import inspect
import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repjax.errors import InputError, unknown
from repjax.onnx.proto import need_onnx
from repjax.quantization.graph import LAYERS, constants, copied, layers_of
from repjax.quantization.runtime import ACTIVATIONS, CALIBRATIONS, batches, fed, need_runtime

# Operators that compute on whole numbers, or pass them on unchanged.
_AROUND = ("Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "Add", "Concat")
_AROUND += ("Gather", "Reshape", "Flatten", "Transpose")

_ROUNDED_ON_LOADING = ("Conv", "ConvTranspose", "Gemm")


def check_choices(activations: str, calibration: str, weight_bits: int) -> None:
  """Raises InputError for an unknown kind of activations, calibration or number of bits."""
  if activations not in ACTIVATIONS:
    raise unknown("kind of activations", activations, ACTIVATIONS)
  if calibration not in CALIBRATIONS:
    raise unknown("calibration", calibration, CALIBRATIONS)
  if weight_bits not in (7, 8):
    raise InputError(f"weights have 8 or 7 bits, got {weight_bits}")


def in_qdq_form(
  proto: Any,
  images: np.ndarray,
  *,
  activations: str,
  calibration: str,
  per_channel: bool,
  weight_bits: int,
  only: Sequence[str] = (),
  but: Sequence[str] = (),
  inputs_only: bool = False,
  scales: Mapping[str, tuple[float, int]] | None = None,
  cache: Path | None = None,
) -> Any:
  """Returns a graph in QDQ form, made by ONNX Runtime's quantizer.

  Args:
    proto: a graph in float32.
    images: images to calibrate with, (N, H, W, 3), in the dtype that the graph takes.
    activations: "uint8" has a zero point, so that all 256 levels are used after a ReLU. "int8" is
      symmetric, as GPUs want it, and rounds only what layers read.
    calibration: a key of CALIBRATIONS.
    per_channel: one scale for each output channel of weights, instead of one for all.
    weight_bits: 8 or 7.
    only: names of the nodes to quantize. Empty: all nodes.
    but: names of nodes that stay in float.
    inputs_only: round only what layers read.
    scales: scale and zero by tensor, which replace those of the calibration.
    cache: a file that keeps the ranges between calls with the same graph, images and choices.

  Raises:
    InputError: an unknown calibration, kind of activations or number of bits.
  """
  check_choices(activations, calibration, weight_bits)
  need_runtime()
  tools: Any = importlib.import_module("onnxruntime.quantization")
  symmetric = activations == "int8"
  inputs_only = inputs_only or symmetric
  tagged = copied(proto)
  # The tag says that the graph was prepared. Without it the quantizer would warn.
  tag = tagged.metadata_props.add()
  tag.key, tag.value = "onnx.quant.pre_process", "onnxruntime.quant"
  quiet = contextlib.redirect_stdout(io.StringIO())  # calibration prints its progress
  with tempfile.TemporaryDirectory() as folder, quiet:
    path = Path(folder) / "quantized.onnx"
    # Older versions keep no ranges. They calibrate in every call.
    keeps = "calibration_cache_path" in inspect.signature(tools.quantize_static).parameters
    tools.quantize_static(
      tagged,
      path,
      _reader(tools, images),
      quant_format=tools.QuantFormat.QDQ,
      op_types_to_quantize=[*LAYERS, *(() if inputs_only else _AROUND)],
      per_channel=per_channel,
      reduce_range=weight_bits == 7,
      activation_type=tools.QuantType.QInt8 if symmetric else tools.QuantType.QUInt8,
      weight_type=tools.QuantType.QInt8,
      nodes_to_quantize=list(only),
      nodes_to_exclude=[*but, *_plain_additions(proto)],
      calibrate_method=getattr(tools.CalibrationMethod, CALIBRATIONS[calibration]),
      extra_options={
        "ActivationSymmetric": symmetric,
        "WeightSymmetric": True,
        "CalibTensorRangeSymmetric": symmetric,
        "CalibStridedMinMax": 1,  # keeps one batch at a time in memory, whatever the method
        "CalibPercentile": 99.99,
        "OpTypesToExcludeOutputQuantization": list(LAYERS) if inputs_only else ["Gemm"],
        "TensorQuantOverrides": {
          **_one_scale_each(proto, weight_bits),
          **_given(scales or {}, activations),
        },
        "QuantizeBias": not symmetric,  # TensorRT takes biases in float
      },
      **({"calibration_cache_path": cache} if keeps and cache else {}),
    )
    made = need_onnx().load(path)
  del made.metadata_props[:]  # the tag
  made.metadata_props.extend(proto.metadata_props)
  _keep_float(made)
  return made


def _keep_float(made: Any) -> None:
  """Puts a Clip without limits before each layer in float that reads a rounded tensor.

  ONNX Runtime from 1.32 on rounds the weights of such a layer to 8 bits when it loads a file (its
  optimizer WeightBiasQuantization). It leaves layers alone that do not read a DequantizeLinear.
  """
  onnx = need_onnx()
  known = {tensor.name for tensor in made.graph.initializer}
  rounded = {node.output[0] for node in made.graph.node if node.op_type == "DequantizeLinear"}
  nodes = []
  for node in made.graph.node:
    if node.op_type in _ROUNDED_ON_LOADING and node.input[0] in rounded and node.input[1] in known:
      free = f"{node.name}/Clip"
      nodes.append(onnx.helper.make_node("Clip", [node.input[0]], [free], name=free))
      node.input[0] = free
    nodes.append(node)
  del made.graph.node[:]
  made.graph.node.extend(nodes)


def _one_scale_each(proto: Any, weight_bits: int) -> dict[str, list[dict[str, Any]]]:
  """Returns overrides that give batched matrices one scale together, not one for each channel."""
  arrays = constants(proto)
  return {
    layer.weight: [{"symmetric": True, "reduce_range": weight_bits == 7}]
    for layer in layers_of(proto)
    if arrays[layer.weight].ndim == 3
  }


def _given(
  scales: Mapping[str, tuple[float, int]], activations: str
) -> dict[str, list[dict[str, Any]]]:
  """Returns overrides that give tensors their scales and zeros."""
  return {
    tensor: [
      {"scale": np.array(scale, np.float32), "zero_point": np.array(zero, np.dtype(activations))}
    ]
    for tensor, (scale, zero) in scales.items()
  }


def _plain_additions(proto: Any) -> list[str]:
  """Returns the nodes that add known numbers, as in normalization and GELU, and stay in float."""
  known = constants(proto)
  return [
    node.name
    for node in proto.graph.node
    if node.op_type == "Add" and any(tensor in known for tensor in node.input)
  ]


def _reader(tools: Any, images: np.ndarray) -> Any:
  """Returns an iterator over batches of images, in the form in which the quantizer wants it."""

  class Reader(tools.CalibrationDataReader):
    def __init__(self):
      self.parts = list(batches(images))
      self.ready = iter(self.parts)

    def __len__(self):
      return len(self.parts)

    def set_range(self, start_index: int, end_index: int):
      self.ready = iter(self.parts[start_index:end_index])

    def get_next(self):
      part = next(self.ready, None)
      return None if part is None else fed(part)

  return Reader()
