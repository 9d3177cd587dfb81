"""Checks an ONNX file: by the ONNX checker, and in ONNX Runtime against JAX."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from repjax import extras
from repjax.errors import InputError
from repjax.onnx.proto import need_onnx

BATCH_SIZES = (1, 3)
TOLERANCES = {"float32": 1e-5, "float16": 5e-3}
"""Dtype to the largest relative error against JAX in the same dtype that is expected."""

WRONG = 0.1
"""A relative error that rounding cannot explain."""


def checked(
  content: bytes, function: Callable[[Any, jax.Array], Any], tree: Any, size: tuple[int, int]
) -> dict[str, Any]:
  """Checks a file's content against the function that the file was made of.

  Args:
    content: bytes of the file.
    function: takes the tree and images (N, H, W, 3).
    tree: parameters.
    size: (height, width) of the images in pixels.

  Returns:
    ONNX Runtime's version and the largest relative error at BATCH_SIZES, or {} if ONNX Runtime is
    not installed.

  Raises:
    InputError: the error is above WRONG, or outputs are not finite.
  """
  onnx = need_onnx()
  onnx.checker.check_model(content, full_check=True)
  if not extras.is_installed("onnxruntime"):
    return {}
  runtime: Any = importlib.import_module("onnxruntime")
  session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
  images = _noise(max(BATCH_SIZES), size, session.get_inputs()[0].type)
  cpu = jax.local_devices(backend="cpu")[0]
  with jax.default_device(cpu), jax.default_matmul_precision("highest"):
    wanted = jax.jit(function)(jax.device_put(tree, cpu), images)
  channels_first = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
  errors = [
    _error(got, np.asarray(rows)[:count])
    for count in BATCH_SIZES
    for got, rows in zip(
      session.run(None, {"images": channels_first[:count]}), jax.tree.leaves(wanted)
    )
  ]
  if not max(errors) <= WRONG:  # so that NaN is refused too
    raise InputError(
      "ONNX Runtime computes something else than JAX: the relative error is "
      f"{max(errors):.1e}. Are all parameters finite, and small enough for the dtype? Otherwise "
      "this is a mistake of repjax"
    )
  return {
    "onnxruntime": runtime.__version__,
    "batch_sizes": list(BATCH_SIZES),
    "relative_error": max(errors),
  }


def _noise(count: int, size: tuple[int, int], kind: str) -> np.ndarray:
  """Draws random images of one of ONNX Runtime's types."""
  rng = np.random.default_rng(0)
  if kind == "tensor(uint8)":
    return rng.integers(0, 256, (count, *size, 3), np.uint8)
  dtype = np.float16 if kind == "tensor(float16)" else np.float32
  return rng.standard_normal((count, *size, 3), np.float32).astype(dtype)


def _error(got: np.ndarray, wanted: np.ndarray) -> float:
  """Returns max|a - b| / max|b|, for maps with channels first and last."""
  wanted = wanted.transpose(0, 3, 1, 2) if wanted.ndim == 4 else wanted
  return float(np.abs(got - wanted).max() / (np.abs(wanted).max() or 1.0))
