"""Tests of benchmarks/ablation.py."""

import json
import re

import pytest

from repjax.configs import digits_ablation

pytest_plugins = ["tests.training.fixtures"]
pytestmark = pytest.mark.usefixtures("quick_programs")


@pytest.mark.proof
def test_a_run_is_written_at_once_and_not_repeated(run_script, tmp_path, digits_dir, monkeypatch):
  build = digits_ablation.get_config

  def smaller(ablation="full"):
    config = build(ablation)
    config.model_overrides.stage_sizes = (1, 1, 1, 1)
    return config

  monkeypatch.setattr(digits_ablation, "get_config", smaller)
  path = tmp_path / "results" / "file.json"
  few = ("--seeds", 3, "--epochs", 0.5, "--data-dir", digits_dir, "--json", path)
  printed = run_script("benchmarks/ablation.py", "--ablations", "trivial", *few)
  assert "trivial, seed 3: " in printed
  printed = run_script("benchmarks/ablation.py", "--ablations", "trivial", "relu_in_branches", *few)
  assert "trivial, seed 3: " not in printed
  cells = json.loads(path.read_text())["cells"]
  trivial, relu = cells["trivial, seed 3"], cells["relu_in_branches, seed 3"]
  assert trivial["deploy_accuracy"] == pytest.approx(trivial["accuracy"], abs=0.01)
  assert relu["deploy_accuracy"] is None
  assert "_relu has a ReLU" in relu["refusal"]
  number = r"\d+\.\d+ ± 0\.0+"
  assert re.search(rf"`trivial` \| {number} \| {number} \| {number} \| 73\.51 \?", printed)
  assert re.search(rf"`relu_in_branches` \| {number} \| refused \| {number} \| 75\.69 \?", printed)


def test_runs_of_other_settings_are_not_mixed(run_script, tmp_path):
  path = tmp_path / "file.json"
  path.write_text(json.dumps({"epochs": 3.0, "cells": {}}))
  with pytest.raises(SystemExit):
    run_script("benchmarks/ablation.py", "--epochs", 2, "--json", path)
