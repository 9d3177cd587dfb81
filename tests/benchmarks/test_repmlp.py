"""Tests of benchmarks/repmlp.py."""

import json

import pytest

import repjax.models
from repjax.models.repmlp import RepMLPCifar

pytest_plugins = ["tests.training.fixtures"]
pytestmark = pytest.mark.usefixtures("quick_programs")


def test_benchmark_of_repmlp_times_forms_and_formulations(run_script, tmp_path, monkeypatch):
  small = {"widths": (4, 4), "stage_sizes": (1, 1), "tile": 4, "local_kernels": (1,)}
  monkeypatch.setitem(repjax.models._MODELS, "tiny", (RepMLPCifar, small))
  path = tmp_path / "results" / "file.json"
  few = ("--repeats", 1, "--rounds", 2, "--batch-sizes", 2)
  printed = run_script(
    "benchmarks/repmlp.py", "--models", "tiny", "--layers", "cifar stage 1", *few, "--json", path
  )
  assert "tiny, batch 2, 8 px: ratio" in printed
  written = json.loads(path.read_text())
  assert written["models"][0]["train"]["params"] > written["models"][0]["deploy"]["params"]
  times = written["layers"][0]["ms"]
  assert times.keys() == {"batched", "eight axes", "grouped", "dense"}
  assert min(times.values()) > 0
