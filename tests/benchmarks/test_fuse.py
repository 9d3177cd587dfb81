"""Tests of benchmarks/fuse.py."""

import json

import pytest

pytest_plugins = ["tests.training.fixtures"]
pytestmark = pytest.mark.usefixtures("quick_programs")


def test_all_subjects_agree_and_are_timed(run_script, tmp_path):
  pytest.importorskip("onnxruntime")
  path = tmp_path / "results" / "file.json"
  few = ("--stages", 1, "--width", 4, "--image-size", 32, "--batch-sizes", 2, "--rounds", 2)
  printed = run_script("benchmarks/fuse.py", *few, "--json", path)
  (row,) = json.loads(path.read_text())["rows"]
  assert list(row["subjects"]) == [
    *("jit", "jit-fused", "compile-unfused", "compile", "onnx", "onnx-fused"),
  ]
  for name, subject in row["subjects"].items():
    assert f"{name:<16}{subject['ms']:>10.1f} ms" in printed
  assert row["subjects"]["jit"]["ratio"] == row["subjects"]["onnx"]["ratio"] == 1


@pytest.mark.proof
def test_models_of_repjax_are_planned_and_timed_in_all_forms(run_script, tmp_path):
  path = tmp_path / "results" / "file.json"
  few = ("--models", "repvgg_a0", "--image-size", 32, "--batch-sizes", 2, "--rounds", 2)
  few = (*few, "--subjects", "jit-fused", "deploy")
  printed = run_script("benchmarks/fuse.py", "--plans", *few, "--json", path)
  results = json.loads(path.read_text())
  plan, (row,) = results["plans"]["repvgg_a0"], results["rows"]
  assert plan["products"] == [45, 23]
  assert plan["peak_bytes"][0] <= plan["peak_bytes"][1]
  assert "45 -> 23   planned in" in printed
  assert list(row["subjects"]) == ["jit", "jit-fused", "deploy"]
