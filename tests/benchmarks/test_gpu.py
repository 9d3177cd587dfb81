"""Tests of benchmarks/gpu.py: what it needs, and what a run that was cut leaves."""

import importlib
import subprocess
import sys

import pytest

from tests.training import tiny

BENCHMARKS = tiny.ROOT / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
  monkeypatch.syspath_prepend(BENCHMARKS)
  return importlib.import_module("gpu")


def test_no_package_that_reads_data_sets_is_needed():
  program = """
import sys
for name in ("ml_collections", "tensorflow_datasets", "grain", "array_record", "google_crc32c"):
  sys.modules[name] = None  # importing it raises
import gpu, gpu_peers, inference, plot, subjects, timing, training_subjects
"""
  paths = {"PYTHONPATH": f"{BENCHMARKS}:{tiny.ROOT}", "JAX_PLATFORMS": "cpu", "PATH": ""}
  done = subprocess.run([sys.executable, "-c", program], env=paths, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_a_row_that_was_cut_is_left_out(gpu, tmp_path):
  assert gpu.rows(tmp_path) == []
  gpu.append(tmp_path, {"key": "a"})
  with (tmp_path / "rows.jsonl").open("a") as file:
    file.write('{"key": "b", "resu')
  assert gpu.rows(tmp_path) == [{"key": "a"}]


def test_a_second_run_measures_what_is_missing_and_goes_on_after_a_failure(
  gpu, tmp_path, monkeypatch
):
  first, second, third = gpu.jobs(rehearse=True)[:3]
  monkeypatch.setattr(gpu, "jobs", lambda rehearse: [first, second, third])
  gpu.append(tmp_path, {"key": first.key, "part": "inference", "results": []})
  gpu.append(tmp_path, {"key": second.key, "part": "inference", "reason": "no time was left"})
  measured = []

  def measure(kinds, task, names, **race):
    measured.append(task.batch_size)
    if len(measured) == 1:
      raise RuntimeError("out of memory")
    return []

  monkeypatch.setattr(importlib.import_module("inference"), "measure", measure)
  gpu.run_jobs("inference", tmp_path, True, lambda: 1000.0)
  assert measured == [second.batch_size, third.batch_size]
  last = gpu.rows(tmp_path)[2:]
  assert [row["key"] for row in last] == [second.key, third.key]
  assert last[0]["reason"] == "RuntimeError: out of memory"
  assert last[1]["results"] == []


def test_keys_tell_all_jobs_apart(gpu):
  for rehearse in (False, True):
    keys = [job.key for job in gpu.jobs(rehearse)]
    assert len(set(keys)) == len(keys)
