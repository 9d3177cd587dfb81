"""Tests of benchmarks/covariance.py."""

import json

import pytest

import repjax.models
from repjax.models.repvgg import RepVGG
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]
pytestmark = pytest.mark.usefixtures("quick_programs")


def test_benchmark_of_the_covariance_times_every_way(run_script, tmp_path, monkeypatch):
  monkeypatch.setitem(repjax.models._MODELS, "tiny", (RepVGG, tiny.OVERRIDES))
  path = tmp_path / "file.json"
  few = ("--rounds", 2, "--batch-sizes", 2, "--image-sizes", 16, "--cpu-time")
  printed = run_script("benchmarks/covariance.py", "--models", "tiny", *few, "--json", path)
  assert "tiny, batch 2, 16 px" in printed
  (row,) = json.loads(path.read_text())["models"]
  assert all(row[way]["ms"] > 0 for way in ("outputs", "auto", "covariance"))
  assert row["covariance"]["temporary_mib"] != row["outputs"]["temporary_mib"]
  assert row["outputs"]["ratios"] == [1.0]
