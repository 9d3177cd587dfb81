"""Tests of benchmarks/fuse_models.py."""

import json

import pytest

pytest_plugins = ["tests.training.fixtures"]
pytestmark = pytest.mark.usefixtures("quick_programs")


@pytest.mark.proof
def test_all_forms_agree_and_are_timed(run_script, tmp_path):
  path = tmp_path / "results" / "file.json"
  few = ("--models", "repvgg_a0", "--image-size", 32, "--batch-sizes", 2, "--rounds", 2)
  printed = run_script("benchmarks/fuse_models.py", *few, "--json", path)
  results = json.loads(path.read_text())
  plan, (row,) = results["plans"]["repvgg_a0"], results["rows"]
  assert plan["products"] == [45, 23]
  assert plan["peak_bytes"][0] <= plan["peak_bytes"][1]
  assert list(row["subjects"]) == ["plain", "fused", "deploy"]
  assert row["subjects"]["plain"]["ratio"] == 1
  assert all(f"{subject['ms']:>9.1f} ms" in printed for subject in row["subjects"].values())
