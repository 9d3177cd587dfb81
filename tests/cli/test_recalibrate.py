"""Tests of `repjax recalibrate`."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import repjax
from repjax import weights
from repjax.spec import Preprocessing
from tests.cli.helpers import stop_of
from tests.training import tiny
from tests.weights import cases

pytest_plugins = ["tests.training.fixtures"]
pytestmark = pytest.mark.usefixtures("quick_programs")


def report_of(workdir):
  return json.loads((workdir / "deploy" / "report.json").read_text())


def test_it_re_estimates_converts_again_and_undoes_it(run_command, finished, tmp_path):
  workdir = shutil.copytree(finished[0], tmp_path / "run")
  printed = run_command("recalibrate", "--workdir", workdir, "--batches", 2, "--batch-size", 64)
  report = report_of(workdir)
  record, accuracy = report["recalibrated"], report["accuracy"]["train"]
  assert (record["batches"], record["images"]) == (2, 128)
  first, second, *table = printed.splitlines()
  assert first == (
    f"batch norms of step {record['step']} re-estimated over 2 batches of 64 images of digits's "
    "train split"
  )
  before = finished[1]["accuracy"]["train"]
  assert second.startswith(f"test accuracy {before:.2%} -> {accuracy:.2%}, loss ")
  assert table[-2:] == ["statistics re-estimated over 2 batches", f"saved: {workdir}/deploy"]

  printed = run_command("evaluate", "--workdir", workdir)
  header, trained, deployed, note, _ = printed.splitlines()
  assert header.split() == ["form", "parameters", "accuracy", "loss"]
  assert trained.split()[2] == deployed.split()[2] == f"{accuracy:.2%}"
  assert note == "training form with batch norms re-estimated over 2 batches"

  printed = run_command("recalibrate", "--workdir", workdir, "--undo")
  assert printed.startswith("the checkpoint's own statistics are in use again\n")
  assert report_of(workdir) == finished[1]

  # As after a command that was stopped before it converted.
  shutil.rmtree(workdir / "deploy")
  printed = run_command("recalibrate", "--workdir", workdir, "--undo")
  assert printed.startswith("the checkpoint's own statistics are in use\n")
  assert report_of(workdir) == finished[1]


@pytest.mark.proof
def test_an_import_is_recalibrated_on_what_is_named_and_undone_on_noise(run_command, tmp_path):
  path, folder = tmp_path / "a0.npz", tmp_path / "imported"
  np.savez(path, **cases.random_state("repvgg_a0", "train", "timm", **cases.TINY))
  weights.import_weights(str(path), folder, overrides=cases.TINY)
  small = Preprocessing(32, 32)  # small images are quick
  dataclasses.replace(repjax.ModelSpec.read(folder), preprocessing=small).write(folder)
  text = stop_of(run_command, "recalibrate", "--workdir", folder, "--batches", 1)
  assert text.startswith("error: no data set is named")
  named = ("--dataset", "synthetic", "--split", "sample", "--eval-split", "sample")
  size = ("--batches", 2, "--batch-size", 8)
  printed = run_command("recalibrate", "--workdir", folder, *named, *size)
  assert "2 batches of 8 images of synthetic's sample split" in printed
  assert report_of(folder)["recalibrated"]["images"] == 16
  printed = run_command("recalibrate", "--workdir", folder, "--undo", "--eval-split", "test")
  assert "16 of 16 noise images" in printed
  assert report_of(folder)["recalibrated"] is None
  assert repjax.load(folder)[0].deploy


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (("--batches", "0"), "error: statistics need at least 1 batch, got 0"),
    (("--batches", "1", "--dataset", "digit"), "error: unknown data set 'digit'"),
    (("--batches", "1", "--split", "trian"), "error: unknown split of digits 'trian'"),
  ],
  ids=str,
)
def test_a_mistake_is_one_paragraph_and_nothing_is_written(
  run_command, finished, tmp_path, arguments, said
):
  workdir = shutil.copytree(finished[0], tmp_path / "run")
  before = tiny.contents(workdir)
  assert stop_of(run_command, "recalibrate", "--workdir", workdir, *arguments).startswith(said)
  assert tiny.contents(workdir) == before


@pytest.mark.parametrize("arguments", [(), ("--batches", "1", "--undo")], ids=str)
def test_it_is_told_one_thing_to_do(run_command, finished, arguments):
  text = stop_of(run_command, "recalibrate", "--workdir", finished[0], *arguments)
  assert text.startswith("error: ")
  assert "--batches" in text
