"""Tests of `repjax quantize`."""

import importlib
import importlib.util
import json

import numpy as np
import pytest

import repjax
from repjax import training
from repjax.cli import int8_table
from repjax.disk import trees
from repjax.errors import InputError
from repjax.quantization import processor, runtime
from tests.helpers import random_variables
from tests.quantization.int8 import SPEC, needs_onnx
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]


@pytest.fixture
def workdir(tmp_path):
  """Writes a deploy folder with random variables and a config, as an import makes it."""
  model = SPEC.create_model(deploy=True)
  params = random_variables(model, np.zeros((1, 16, 16, 3), np.float32))["params"]
  folder = tmp_path / "run"
  trees.write_tree(folder / "params", params)
  SPEC.write(folder)
  config = json.loads(tiny.config(tmp_path, dataset="synthetic").to_json_best_effort())
  (folder / "config.json").write_text(json.dumps(config))
  return folder


@needs_onnx
def test_quantize_writes_a_folder_and_a_table(run_command, workdir, tmp_path, monkeypatch):
  monkeypatch.setattr(processor, "saturates", lambda: True)
  target = tmp_path / "below" / "int8"
  few = ("--images", 16, "--timed-rounds", 2, "--float-layers", 1)
  printed = run_command("quantize", "--workdir", workdir, "--to", target, *few)
  assert "no VNNI" not in printed  # weights in 7 bits need no warning
  lines = printed.splitlines()
  facts = json.loads((target / "export.json").read_text())
  assert lines[0].startswith(f"ranking {len(facts['sensitivity'])} layers")
  assert lines[1].startswith("ranked in ")
  assert lines[3].split()[0] == facts["sensitivity"][0]["layer"]
  assert lines[3].endswith("left in float32")
  assert facts["settings"]["float_layers"] == [facts["sensitivity"][0]["node"]]
  table = {line.split("  ")[0]: line.split() for line in lines if "%" in line}
  assert f"{facts['accuracy']['int8']:.2%}" in table["int8"]
  for name in ("float32", "bfloat16, JAX", "int8 weights", "int8"):
    assert name in table
  assert "calibrated with 16 of its train split" in printed
  assert "times: 2 rounds of 10 calls with a batch of 1;" in printed
  names = {"model.onnx", "run_onnx.py", "export.json", "model.json", "manifest.json"}
  if importlib.util.find_spec("matplotlib"):
    names |= {"sensitivity.png"}
    assert (target / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
  assert {path.name for path in target.iterdir()} == names
  runtime.session(importlib.import_module("onnx").load(target / "model.onnx"))
  with pytest.raises(InputError, match="which ONNX Runtime, OpenVINO or TensorRT runs and JAX"):
    repjax.deploy.load_exported(target)
  with pytest.raises(SystemExit, match="exists already"):
    run_command("quantize", "--workdir", workdir, "--to", target)


@needs_onnx
def test_int8_weights_come_without_a_ranking(run_command, workdir, tmp_path, monkeypatch):
  monkeypatch.setattr("repjax.quantization.sensitivity", None)  # a call would fail
  few = ("--images", 16, "--timed-rounds", 2, "--weights-only", "--weight-bits", 8)
  monkeypatch.setattr(processor, "saturates", lambda: True)
  printed = run_command("quantize", "--workdir", workdir, "--to", tmp_path / "small", *few)
  assert "no VNNI" not in printed
  assert "layer alone in int8" not in printed
  assert {path.name for path in (tmp_path / "small").iterdir()} == {
    *("model.onnx", "run_onnx.py", "export.json", "model.json", "manifest.json")
  }
  facts = json.loads((tmp_path / "small" / "export.json").read_text())
  assert facts["dtype"] == "int8 weights"
  assert not facts.keys() & {"settings", "sensitivity"}


@needs_onnx
def test_symmetric_activations_take_weights_in_8_bits(run_command, workdir, tmp_path, monkeypatch):
  monkeypatch.setattr(processor, "saturates", lambda: True)
  few = ("--images", 16, "--timed-rounds", 2, "--activations", "int8", "--no-bias-correction")
  few = (*few, "--no-ranking")
  printed = run_command("quantize", "--workdir", workdir, "--to", tmp_path / "int8", *few)
  assert "ranking" not in printed
  assert not (tmp_path / "int8" / "sensitivity.png").exists()
  assert "no VNNI" not in printed  # sums of int8 and int8 do not overflow
  settings = json.loads((tmp_path / "int8" / "export.json").read_text())["settings"]
  assert (settings["activations"], settings["weight_bits"]) == ("int8", 8)


@needs_onnx
def test_a_row_that_is_not_finite_is_named_and_not_printed(
  run_command, workdir, monkeypatch, capsys
):
  def diverged(baseline):
    del baseline
    return lambda images: np.full((len(images), 10), np.nan, np.float32), 1

  monkeypatch.setattr("repjax.cli.int8_table._in_jax", diverged)
  with pytest.raises(SystemExit) as stop:
    run_command("quantize", "--workdir", workdir, "--images", 16, "--weights-only")
  assert "the row 'bfloat16, JAX' gives logits that are NaN or infinite on 100%" in stop.value.code
  assert "nan" not in capsys.readouterr().out


@needs_onnx
def test_mistakes_end_in_one_paragraph(run_command, workdir, tmp_path, monkeypatch, capsys):
  def text(*arguments):
    with pytest.raises(SystemExit) as stop:
      run_command("quantize", *arguments)
    return stop.value.code

  assert text("--workdir", tmp_path / "no").startswith(f"error: the folder {tmp_path}/no does not")
  assert "error: 0 images to calibrate with are asked for" in text(
    "--workdir", workdir, "--images", 0
  )
  assert "need the ranking of the layers; leave out --no-ranking" in text(
    "--workdir", workdir, "--no-ranking", "--float-layers", 1
  )
  assert "--weights-only takes the weights of all layers" in text(
    "--workdir", workdir, "--weights-only", "--float-layers", 1
  )
  assert "are the same: the test split of synthetic" in text(
    "--workdir", workdir, "--calibration-split", "test"
  )
  assert "unknown data set 'digit'; did you mean digits" in text(
    "--workdir", workdir, "--dataset", "digit"
  )
  monkeypatch.setattr(processor, "saturates", lambda: True)
  assert "--float-layers takes 0 to 5, got 6" in text(
    *("--workdir", workdir, "--float-layers", 6, "--images", 1, "--weight-bits", 8)
  )
  assert "note: this CPU has no VNNI" in capsys.readouterr().out
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(
    "importlib.util.find_spec",
    lambda name, *rest: None if name == "onnxruntime" else find_spec(name, *rest),
  )
  assert text("--workdir", workdir).startswith("error: for 8 bits, the package onnxruntime")


@pytest.mark.parametrize(
  ("base", "seconds", "said"),
  [
    ([2.0, 2.2, 1.8, 4.0], [1.0, 1.1, 0.9, 2.0], "2.00x"),
    ([2.0, 2.0, 2.0, 2.0], [4.0, 4.0, 4.0, 9.0], "0.50x"),  # one disturbed round of four
    ([3.0, 29.0, 29.0, 29.0], [1.0, 1.0, 1.0, 1.0], "unclear"),  # one undisturbed round of four
    ([1.0, 1.0, 1.0, 1.0], [0.9, 1.1, 0.8, 1.2], "unclear"),
    ([1.0], [0.5], "unclear"),
    ([1.0, 1.1], [1.0, 1.1], "1.00x"),
  ],
)
def test_a_speed_is_told_where_the_rounds_agree(base, seconds, said):
  assert int8_table.speed(base, seconds) == said


@needs_onnx
@pytest.mark.usefixtures("quick_programs")
def test_maps_are_judged_by_their_pixels_in_windows(segmented):
  folder = segmented[0]
  baseline = int8_table.read_baseline(folder, 4)
  assert baseline.size == (12, 12)  # the window of the run, and not the canvas of 16
  rows = int8_table.measure(baseline, {}, batch_size=1, rounds=1)
  wanted = training.evaluate(tiny.segmentation(eval_flip=False), folder, deploy=True)
  for name, margin in (("float32", 0.005), ("bfloat16, JAX", 0.05)):
    assert list(rows[name].scores) == ["miou", "accuracy"]
    for score, value in rows[name].scores.items():
      assert value == pytest.approx(wanted[score], abs=margin)
  assert rows["float32"].error == 0 < rows["bfloat16, JAX"].error < 0.05
  assert rows["float32"].loss == pytest.approx(wanted["loss"], rel=1e-3)
