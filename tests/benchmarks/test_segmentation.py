"""Tests of benchmarks/segmentation.py."""

import importlib
import json

import pytest

from tests.models.families import FAMILIES
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]
pytestmark = pytest.mark.usefixtures("quick_programs")


def test_both_forms_of_every_network_have_a_row(monkeypatch, tmp_path, capsys):
  monkeypatch.syspath_prepend(tiny.ROOT / "benchmarks")
  benchmark, path = importlib.import_module("segmentation"), tmp_path / "file.json"
  small = FAMILIES["pspnet"].overrides
  networks = {"small-fast": small, "small": small | {"dilation": "full"}}
  monkeypatch.setattr(benchmark, "NETWORKS", networks)
  options = ["--image-size", "33", "--rounds", "2", "--json", str(path), "--networks", *networks]
  monkeypatch.setattr("sys.argv", ["segmentation.py", *options])
  benchmark.main()
  rows = json.loads(path.read_text())["rows"]
  assert [(row["network"], row["form"]) for row in rows] == [
    (name, form) for name in networks for form in ("train", "deploy")
  ]
  assert min(row["seconds"] for row in rows) > 0
  assert rows[3]["ratio"] == 1  # the baseline's deploy form
  assert rows[0]["params"] > rows[1]["params"] == rows[3]["params"]
  assert "GMAC" in capsys.readouterr().out
