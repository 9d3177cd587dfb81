"""Tests of benchmarks/streams.py."""

import json

import pytest

import repjax.models
from repjax.models.parnet import ParNet
from tests.cli.helpers import stop_of

pytest_plugins = ["tests.training.fixtures"]
pytestmark = pytest.mark.usefixtures("quick_programs")


def test_benchmark_of_streams_prints_both_latencies_and_what_bounds_them(
  run_script, tmp_path, monkeypatch
):
  small = {"widths": (4, 6, 8, 10), "stage_sizes": (1, 1, 1), "strides": (1, 1)}
  monkeypatch.setitem(repjax.models._MODELS, "tiny", (ParNet, small))
  path = tmp_path / "results" / "file.json"
  few = ("--models", "tiny", "--repeats", 1, "--rounds", 2, "--batch-sizes", 2)
  printed = run_script("benchmarks/streams.py", *few, "--devices", 3, "--json", path)
  assert "tiny, batch 2, 32 px, float32: one device" in printed
  (row,) = json.loads(path.read_text())["models"]
  for latency in (f"one device {row['single_ms']:.2f} ms", f"on 3 {row['streams_ms']:.2f} ms"):
    assert latency in printed
  assert f"critical path (*): {' > '.join(row['path'])}" in printed
  assert f"most of it: {row['bound']}" in printed
  model = repjax.create_model("parnet_s", **small)
  macs = sum(piece["macs_per_image"] for piece in row["pieces"])
  assert macs == repjax.analysis.summary(model, 32).deploy.macs
  assert "3 streams run on 3 devices or a multiple, got 4" in stop_of(
    run_script, "benchmarks/streams.py", *few
  )
