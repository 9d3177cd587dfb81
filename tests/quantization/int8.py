"""Helpers of the tests of 8 bits: small models as ONNX files, images, and int8 weights by scope."""

import importlib.util

import numpy as np
import pytest

import repjax
from repjax.quantization.graph import constants
from repjax.spec import Preprocessing
from tests.helpers import random_variables
from tests.training import tiny

MISSING = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(
  bool(MISSING), reason=f"ONNX Runtime's quantizer makes the files: pip install {' '.join(MISSING)}"
)
SPEC = repjax.ModelSpec(
  "repvgg_a0",
  10,
  {name: list(value) for name, value in tiny.OVERRIDES.items()},
  Preprocessing(16, 16, "bilinear", (0.3,) * 3, (0.35,) * 3),
  tuple(str(digit) for digit in range(10)),
)
IMAGES = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), np.uint8)
SCOPES = ["stem", *(f"stage{stage}/block0" for stage in (1, 2, 3, 4)), "head"]


def made(name, overrides, size=16, preprocessing=None):
  """Builds a model in deploy form with random variables, as an ONNX file."""
  model = repjax.create_model(name, num_classes=10, deploy=True, **overrides)
  variables = random_variables(model, np.zeros((1, size, size, 3), np.float32))
  return repjax.onnx.to_onnx(model, variables, image_size=size, preprocessing=preprocessing)


def int8_weights(proto):
  """Returns the scopes whose weights are int8."""
  names = [
    name.split("/", 1)[1]
    for name, array in constants(proto).items()
    if array.dtype == np.int8 and array.ndim > 1
  ]
  return {scope for scope in SCOPES for name in names if name.startswith(scope)}
