"""Tests of processes in which JAX finds no devices."""

import json
import os
import subprocess
import sys

import pytest

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]

CALLS = {
  "load": "repjax.load({folder!r})",
  "Predictor": "repjax.deploy.Predictor({folder!r})",
  "load_exported": "repjax.deploy.load_exported({folder!r})",
  "init": "repjax.init(model, None, 32)",
  "compile": "repjax.deploy.compile(model, {{'params': {{}}}}, image_size=32)",
  "to_onnx": "repjax.onnx.to_onnx(model, {{'params': {{}}}}, image_size=32)",
  "summary": "repjax.analysis.summary(model, 32)",
  "usual": "repjax.ModelSpec.usual('repvgg_a0').variable_shapes()",
  "evaluate": "repjax.training.evaluate(default(), {folder!r})",
  "convert": "repjax.training.convert(default(), {folder!r})",
  "recalibrate": "repjax.training.recalibrate(default(), {folder!r}, num_batches=1)",
  "train": "repjax.training.train(default(), {folder!r} + '/run')",
}
PROGRAM = """
import json
import repjax, repjax.training, repjax.analysis
from repjax.config import default

model = repjax.create_model("repvgg_a0", deploy=True)
said = {}
for name, call in CALLS.items():
  try:
    eval(call)
  except Exception as error:
    said[name] = [type(error).__name__, str(error)]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(small_folder):
  """Returns the error of each call, in a process whose JAX is told to use missing devices."""
  calls = {name: call.format(folder=str(small_folder)) for name, call in CALLS.items()}
  done = subprocess.run(
    [sys.executable, "-c", f"CALLS = {calls!r}\n{PROGRAM}"],
    env=os.environ | {"JAX_PLATFORMS": "cuda"},
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CALLS)
def test_missing_devices_are_named_with_the_way_out(said, name):
  kind, text = said[name]
  assert kind == "InputError", text
  assert "no device of the platform 'cuda'" in text
  assert "JAX_PLATFORMS=cpu" in text
