"""Tests of benchmarks/predict.py, with an interpreter that only logs its arguments."""

import json
import sys

import pytest

import repjax.models
from repjax.models.repvgg import RepVGG
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]

PYTHON = """#!/bin/sh
test -e "$XDG_CACHE_HOME/warm" && echo "warm $2" >> {log} || echo "cold $*" >> {log}
touch "$XDG_CACHE_HOME/warm"
echo answer
exit {status}
"""


@pytest.fixture
def benchmark(run_script, monkeypatch, tmp_path):
  """Runs the benchmark with an interpreter that ends with a status; returns what it printed."""
  monkeypatch.setitem(repjax.models._MODELS, "tiny", (RepVGG, tiny.OVERRIDES))

  def run(status, *arguments):
    python = tmp_path / "python"
    python.write_text(PYTHON.format(log=tmp_path / "log", status=status))
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    return run_script("benchmarks/predict.py", "--model", "tiny", *arguments)

  return run


def test_the_first_answer_is_cold_and_the_others_are_warm_in_turns(benchmark, tmp_path):
  printed = benchmark(0, "--starts", 2, "--json", tmp_path / "below" / "file.json")
  first, *others = (tmp_path / "log").read_text().splitlines()
  assert first.startswith("cold -m repjax predict --workdir ")
  assert [line.split()[0] for line in others] == ["warm"] * 8
  assert [line.split()[1] for line in others] == ["import", "import", "import", "repjax"] * 2
  written = json.loads((tmp_path / "below" / "file.json").read_text())
  assert [each.keys() for each in written["warm"]] == [{"jax", "flax", "repjax", "answer"}] * 2
  assert [line.split()[0] for line in printed.splitlines()] == ["cold", "warm"]


def test_an_answer_that_fails_is_no_measurement(benchmark):
  with pytest.raises(SystemExit, match="ended with status 3"):
    benchmark(3)
