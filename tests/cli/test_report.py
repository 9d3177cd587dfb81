"""Tests of `repjax report`."""

import functools
import importlib.util
import json
import shutil

import numpy as np
import pytest

from repjax import weights
from tests.weights import cases

pytest_plugins = ["tests.training.fixtures"]
pytestmark = pytest.mark.usefixtures("quick_programs")

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def report(run_command):
  """Runs `repjax report` in this process, and returns what it printed."""
  return functools.partial(run_command, "report")


def test_a_run_gets_its_picture_again(report, finished, tmp_path):
  workdir = shutil.copytree(finished[0], tmp_path / "run")
  (workdir / "report.png").unlink()
  assert report("--workdir", workdir) == f"saved: {workdir}/report.png\n"
  assert (workdir / "report.png").read_bytes().startswith(PNG)


def test_runs_are_compared_and_what_is_damaged_is_said(report, finished, tmp_path):
  other, target = shutil.copytree(finished[0], tmp_path / "other"), tmp_path / "both.png"
  with (other / "metrics.jsonl").open("a") as file:
    file.write('{"step": 99')
  printed = report("--workdir", finished[0], "--compare", other, "--output", target)
  assert printed == f"{other}/metrics.jsonl: 1 damaged line left out\nsaved: {target}\n"
  assert len(target.read_bytes()) > 30_000


@pytest.mark.parametrize("kind", ["train", "deploy"])
def test_an_import_gets_a_picture(report, tmp_path, kind):
  state = cases.random_state("repvgg_a0", kind, "timm", **cases.TINY)
  np.savez(tmp_path / "file.npz", **state)
  workdir = tmp_path / "imported"
  weights.import_weights(
    str(tmp_path / "file.npz"), workdir, model_name="repvgg_a0", overrides=cases.TINY
  )
  assert report("--workdir", workdir) == f"saved: {workdir}/report.png\n"
  assert (workdir / "report.png").read_bytes().startswith(PNG)


def test_a_folder_that_is_no_run_is_one_paragraph(report, tmp_path):
  with pytest.raises(SystemExit) as stop:
    report("--workdir", tmp_path)
  assert stop.value.code.startswith(f"error: {tmp_path}/model.json does not exist; is")


def test_without_matplotlib_the_command_is_named(report, finished, monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    "importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name)
  )
  with pytest.raises(SystemExit) as stop:
    report("--workdir", finished[0])
  assert stop.value.code.startswith("error: for the picture, the package matplotlib")


def test_the_end_of_a_run_names_its_picture(finished):
  workdir, _, printed = finished
  assert printed.splitlines()[-1] == f"picture: {workdir}/report.png"
  rows = [json.loads(line) for line in (workdir / "timing.jsonl").read_text().splitlines()]
  assert all(row.keys() == {"step", "images", "seconds", "waited"} for row in rows)
