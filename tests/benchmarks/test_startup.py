"""Tests of benchmarks/startup.py, with a program that prints the lines of main.py."""

import json
import runpy

import pytest

from tests.training import tiny

SCRIPT = tiny.ROOT / "benchmarks" / "startup.py"
PROGRAM = """
import os, pathlib, sys, time
cache = pathlib.Path(os.environ["XDG_CACHE_HOME"]) / "cache"
print("workdir: there", flush=True)
print("compiling the first step", flush=True)
with open(pathlib.Path(__file__).with_name("starts"), "a") as starts:
  starts.write("warm " if cache.exists() else "cold ")
time.sleep(0 if cache.exists() else 0.5)
cache.touch()
print("step 1/1  loss 1.0", flush=True)
sys.exit({status})
"""


@pytest.fixture
def benchmark(monkeypatch, capsys, tmp_path):
  """Runs the benchmark on a main.py that ends with a status; returns what it printed."""

  def run(status, *arguments):
    (tmp_path / "benchmarks").mkdir()
    script = tmp_path / "benchmarks" / SCRIPT.name
    script.write_text(SCRIPT.read_text())
    (tmp_path / "main.py").write_text(PROGRAM.format(status=status))
    monkeypatch.setattr("sys.argv", [str(script), *map(str, arguments)])
    runpy.run_path(str(script), run_name="__main__")
    return capsys.readouterr().out

  return run


def test_the_first_start_is_cold_and_the_others_are_warm(benchmark, tmp_path):
  printed = benchmark(0, "--starts", 2, "--json", tmp_path / "file.json")
  written = json.loads((tmp_path / "file.json").read_text())
  assert (tmp_path / "starts").read_text().split() == ["cold", "warm", "warm"]
  assert written["cold"]["first step"] > 0.5
  for each in (written["cold"], *written["warm"]):
    assert each["all"] == pytest.approx(sum(each.values()) - each["all"])
  assert [line.split()[0] for line in printed.splitlines()] == ["cold", "warm"]


def test_a_start_that_fails_is_no_measurement(benchmark):
  with pytest.raises(SystemExit, match="ended with status 3"):
    benchmark(3, "--starts", 0)
