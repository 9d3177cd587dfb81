"""ONNX Runtime as a tool: runs a model on images, and shows the tensors inside."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from repjax import extras
from repjax.errors import InputError
from repjax.onnx.proto import need_onnx
from repjax.quantization.graph import copied, layers_of
from repjax.schema import shown

CALIBRATIONS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
"""Ways to derive ranges from values, by their names here and in ONNX Runtime."""

ACTIVATIONS = ("uint8", "int8")
BATCH = 32

Classify = Callable[[np.ndarray], np.ndarray]
"""A function from images (N, S, S, 3), in the dtype that a graph takes, to logits (N, K)."""


def need_runtime() -> Any:
  """Returns the package onnxruntime.

  Raises:
    InputError: onnxruntime or onnx is not installed.
  """
  need_onnx()
  return extras.need("onnxruntime", "8 bits")


def check_images(proto: Any, images: np.ndarray) -> None:
  """Raises InputError for images that a model does not take, or for no images."""
  kinds = {1: "float32", 2: "uint8", 10: "float16"}
  info = proto.graph.input[0].type.tensor_type
  channels, height, width = (size.dim_value for size in info.shape.dim[1:])
  wanted = (height, width, channels), kinds.get(info.elem_type)
  shape, dtype = getattr(images, "shape", ()), getattr(images, "dtype", None)
  if len(shape) != 4 or not shape[0] or (shape[1:], str(dtype)) != wanted:
    given = shown(images) if dtype is None else f"{shape} of {dtype}"
    raise InputError(
      f"calibration takes one array of images (N, {height}, {width}, {channels}) of {wanted[1]}, "
      f"as the graph does, with at least one image, got {given}"
    )
  if not np.isfinite(images).all():
    raise InputError("the images to calibrate with are not finite. Look at how they were made")


def check_finite(proto: Any, images: np.ndarray, found: Iterable[np.ndarray]) -> None:
  """Raises InputError if a layer gives NaN or infinite values, and names the first such layer.

  Args:
    proto: the model that was run.
    images: the images that it was run on.
    found: what was computed from its tensors. NaN and infinity must have passed into it.
  """
  if all(np.isfinite(values).all() for values in found):
    return
  # Only now is it worth a second run, which looks at every layer.
  layers = layers_of(proto)
  bad = set()
  for batch in observed(proto, [layer.result for layer in layers], images):
    bad |= {number for number, maps in enumerate(batch) if not np.isfinite(maps).all()}
  where = f"the layer {layers[min(bad)].title}" if bad else "an operator between layers"
  raise InputError(
    f"{where} gives NaN or infinite values on the images to calibrate with, for which 8 bits have "
    "no range. Has the network diverged, or do its inputs hold such values?"
  )


def session(proto: Any, threads: int = 0, *, unpacked: bool = False) -> Any:
  """Prepares a model to run on the CPU.

  Args:
    proto: a model of any kind.
    threads: number of threads. 0: one for each core.
    unpacked: turn int8 weights into float32 once, at the start. Otherwise ONNX Runtime would do so
      in every call, and compute a Gemm of such weights in 8 bits.
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
  """Returns images (N, H, W, 3) in the form in which a session takes them."""
  return {"images": np.ascontiguousarray(images.transpose(0, 3, 1, 2))}  # (N, 3, H, W)


def classifier(ready: Any) -> Classify:
  """Returns a function that runs a session on images and returns the logits, classes last."""

  def classify(images: np.ndarray) -> np.ndarray:
    logits = ready.run(None, fed(images))[0]
    # Maps leave a file as (N, K, H, W).
    return np.moveaxis(logits, 1, -1) if logits.ndim == 4 else logits

  return classify


def logits_of(proto: Any, images: np.ndarray, *, unpacked: bool = False) -> np.ndarray:
  """Computes a model's first output for images (N, H, W, 3): (N, K), or maps (N, H, W, K)."""
  classify = classifier(session(proto, unpacked=unpacked))
  return np.concatenate([classify(part) for part in batches(images)])


def observed(proto: Any, tensors: Sequence[str], images: np.ndarray) -> Iterator[list[np.ndarray]]:
  """Yields the arrays of tensors inside a model, batch by batch. No tensors give no batches."""
  if not tensors:
    return
  onnx = need_onnx()
  # A tensor is seen by making it an output, in a copy of the model.
  seen = copied(proto)
  del seen.graph.output[:]
  seen.graph.output.extend(onnx.ValueInfoProto(name=tensor) for tensor in tensors)
  ready = session(seen)
  for part in batches(images):
    yield ready.run(list(tensors), fed(part))


def batches(images: np.ndarray) -> Iterator[np.ndarray]:
  """Yields images in batches of BATCH."""
  return (images[start : start + BATCH] for start in range(0, len(images), BATCH))
