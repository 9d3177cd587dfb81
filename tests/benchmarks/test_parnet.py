"""Tests of benchmarks/parnet.py."""

import json

import pytest

import repjax.models
from repjax.models.parnet import ParNet

pytest_plugins = ["tests.training.fixtures"]
pytestmark = pytest.mark.usefixtures("quick_programs")


def test_benchmark_of_parnet_times_the_authors_fold_too(run_script, tmp_path, monkeypatch):
  small = {"widths": (4, 6, 8, 10), "stage_sizes": (1, 1, 1), "strides": (1, 1)}
  monkeypatch.setitem(repjax.models._MODELS, "tiny", (ParNet, small))
  path = tmp_path / "results" / "file.json"
  few = ("--repeats", 1, "--rounds", 2, "--batch-sizes", 2)
  printed = run_script("benchmarks/parnet.py", "--models", "tiny", *few, "--json", path)
  assert "tiny, batch 2, 32 px" in printed
  (row,) = json.loads(path.read_text())["models"]
  train, authors, deploy = (row[form] for form in ("train", "authors", "deploy"))
  assert min(form["ms"] for form in (train, authors, deploy)) > 0
  assert train["params"] > deploy["params"] > authors["params"]
  # Means and variances of four gate norms, the first of them before all streams, and of four
  # norms of fusion.
  assert authors["statistics"] == 2 * (4 + 4 + 6 + 8 + 2 * 6 + 2 * 8)
  assert (deploy["statistics"], len(authors["ratios"])) == (0, 1)
  assert train["macs"] > authors["macs"] == deploy["macs"]
