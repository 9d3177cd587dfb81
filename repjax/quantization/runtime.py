"""ONNX Runtime: running a model, and its quantizer."""

import contextlib
import importlib
import importlib.util
import inspect
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repjax.errors import InputError, unknown
from repjax.onnx.proto import need_onnx
from repjax.quantization.graph import LAYERS, constants, copied, layers_of

CALIBRATIONS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
ACTIVATIONS = ("uint8", "int8")
BATCH = 32

# What computes on whole numbers, or hands them on as they are.
_AROUND = ("Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "Add", "Concat")
_AROUND += ("Gather", "Reshape", "Flatten", "Transpose")


def need_runtime() -> Any:
  """The package onnxruntime.

  Raises:
    InputError: it or onnx is missing.
  """
  need_onnx()
  if importlib.util.find_spec("onnxruntime") is None:
    raise InputError(
      "8 bits need the package onnxruntime, whose quantizer makes them: pip install "
      "'repjax[onnx]', or pip install onnxruntime"
    )
  return importlib.import_module("onnxruntime")


def check_images(proto: Any, images: np.ndarray) -> None:
  """Raises InputError for images that a model does not take, or none at all."""
  kinds = {1: "float32", 2: "uint8", 10: "float16"}
  info = proto.graph.input[0].type.tensor_type
  channels, height, width = (size.dim_value for size in info.shape.dim[1:])
  wanted = (height, width, channels), kinds.get(info.elem_type)
  if images.ndim != 4 or not len(images) or (images.shape[1:], images.dtype.name) != wanted:
    raise InputError(
      f"calibration takes at least one image (N, {height}, {width}, {channels}) of {wanted[1]}, as "
      f"the graph does, got {images.shape} of {images.dtype}"
    )
  if not np.isfinite(images).all():
    raise InputError("the images to calibrate with are not finite; look at how they were made")


def session(proto: Any, threads: int = 0, *, unpacked: bool = False) -> Any:
  """A model that is ready to run on the CPU.

  Args:
    proto: of any kind.
    threads: 0: as many as there are cores.
    unpacked: int8 weights become float32 at the start. Otherwise ONNX Runtime would do so in every
      call, and compute a Gemm of such weights in 8 bits.
  """
  runtime = need_runtime()
  options = runtime.SessionOptions()
  options.intra_op_num_threads = threads
  options.log_severity_level = 3
  if unpacked:
    options.add_session_config_entry("session.disable_quant_qdq", "1")
  return runtime.InferenceSession(
    proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
  )


def fed(images: np.ndarray) -> dict[str, np.ndarray]:
  """What a session takes for images (N, H, W, 3)."""
  return {"images": np.ascontiguousarray(images.transpose(0, 3, 1, 2))}


def logits_of(proto: Any, images: np.ndarray, *, unpacked: bool = False) -> np.ndarray:
  """A model's first output for images (N, H, W, 3)."""
  ready = session(proto, unpacked=unpacked)
  return np.concatenate([ready.run(None, fed(part))[0] for part in _parts(images)])


def observed(proto: Any, tensors: Sequence[str], images: np.ndarray) -> Iterator[list[np.ndarray]]:
  """Tensors inside a model, batch by batch; of no tensors there are no batches."""
  if not tensors:
    return
  onnx = need_onnx()
  seen = copied(proto)
  del seen.graph.output[:]
  seen.graph.output.extend(onnx.ValueInfoProto(name=tensor) for tensor in tensors)
  ready = session(seen)
  for part in _parts(images):
    yield ready.run(list(tensors), fed(part))


def _parts(images: np.ndarray) -> Iterator[np.ndarray]:
  return (images[start : start + BATCH] for start in range(0, len(images), BATCH))


def check_settings(activations: str, calibration: str, weight_bits: int) -> None:
  """Raises InputError for a kind of activations, a calibration or a number of bits not known."""
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
  """A model as ONNX Runtime's own quantizer makes it of one in float32.

  Args:
    proto: in float32.
    images: to calibrate with, as the graph takes them but (N, H, W, 3).
    activations: "uint8", with a zero point, so that behind a ReLU all 256 levels are used; or
      "int8", symmetric, as GPUs want it. Then only what layers read is rounded.
    calibration: of CALIBRATIONS.
    per_channel: a scale for each output channel of weights, instead of one for all.
    weight_bits: 8 or 7.
    only: names of the nodes to quantize, if not all.
    but: names of nodes that stay in float.
    inputs_only: round only what layers read.
    scales: tensor to the scale and the zero that are to be its own, instead of those by the values
      seen.
    cache: a file that keeps the ranges between calls with the same model, images and settings.

  Raises:
    InputError: no such calibration, kind of activations or number of bits.
  """
  check_settings(activations, calibration, weight_bits)
  need_runtime()
  tools: Any = importlib.import_module("onnxruntime.quantization")
  symmetric = activations == "int8"
  inputs_only = inputs_only or symmetric
  tagged = copied(proto)
  tag = tagged.metadata_props.add()  # nothing is left to prepare, about which it would warn
  tag.key, tag.value = "onnx.quant.pre_process", "onnxruntime.quant"
  quiet = contextlib.redirect_stdout(io.StringIO())  # calibration prints what it does
  with tempfile.TemporaryDirectory() as folder, quiet:
    path = Path(folder) / "model.onnx"
    # Older versions calibrate once more instead.
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
        "CalibStridedMinMax": 1,  # one batch at a time in memory, whatever the method
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
  del made.metadata_props[:]
  return made


def _one_scale_each(proto: Any, weight_bits: int) -> dict[str, list[dict[str, Any]]]:
  """What keeps the quantizer from a scale for each channel of matrices in a batch."""
  arrays = constants(proto)
  return {
    layer.weight: [{"symmetric": True, "reduce_range": weight_bits == 7}]
    for layer in layers_of(proto)
    if arrays[layer.weight].ndim == 3
  }


def _given(
  scales: Mapping[str, tuple[float, int]], activations: str
) -> dict[str, list[dict[str, Any]]]:
  """Scales and zeros in the form in which the quantizer takes them."""
  return {
    tensor: [
      {"scale": np.array(scale, np.float32), "zero_point": np.array(zero, np.dtype(activations))}
    ]
    for tensor, (scale, zero) in scales.items()
  }


def _plain_additions(proto: Any) -> list[str]:
  """Additions of known numbers, as in normalizing images and in GELU, which stay in float."""
  known = constants(proto)
  return [
    node.name
    for node in proto.graph.node
    if node.op_type == "Add" and any(tensor in known for tensor in node.input)
  ]


def _reader(tools: Any, images: np.ndarray) -> Any:
  """Batches of images, in the form in which the quantizer asks for them."""

  class Reader(tools.CalibrationDataReader):
    def __init__(self):
      self.parts = list(_parts(images))
      self.ready = iter(self.parts)

    def __len__(self):
      return len(self.parts)

    def set_range(self, start_index: int, end_index: int):
      self.ready = iter(self.parts[start_index:end_index])

    def get_next(self):
      part = next(self.ready, None)
      return None if part is None else fed(part)

  return Reader()
