"""Tests of `repjax convert`, `evaluate`, `import` and `export-weights`."""

import hashlib
import json
import os
import shutil

import jax
import numpy as np
import pytest

import repjax
from repjax import weights
from repjax.runs import lock
from tests.cli.helpers import stop_of
from tests.training import tiny
from tests.training.tiny import ROOT
from tests.weights import cases

pytest_plugins = ["tests.training.fixtures"]
pytestmark = pytest.mark.usefixtures("quick_programs")


@pytest.fixture
def workdir(finished, tmp_path):
  """Returns a copy of a finished run."""
  return shutil.copytree(finished[0], tmp_path / "run")


@pytest.fixture
def checkpoint(tmp_path):
  """Writes the state dict of a small network with 10 classes in timm's names; returns its path."""

  def write(kind="train"):
    path = tmp_path / f"repvgg_a0-{kind}.npz"
    np.savez(path, **cases.random_state("repvgg_a0", kind, "timm", **cases.TINY))
    return path

  return write


@pytest.fixture
def import_weights(run_command, tmp_path):
  """Imports the checkpoint of a small network; returns the workdir and what was printed."""

  def run(path, *arguments):
    workdir = tmp_path / "imported"
    overrides = ("--overrides", json.dumps(cases.TINY))
    return workdir, run_command(
      "import", "--from", path, "--workdir", workdir, *overrides, *arguments
    )

  return run


def test_convert_makes_the_deploy_form_again(run_command, workdir, finished):
  shutil.rmtree(workdir / "deploy")
  printed = run_command("convert", "--workdir", workdir)
  assert json.loads((workdir / "deploy" / "report.json").read_text()) == finished[1]
  assert "360 of 360 images" in printed
  assert printed.endswith(f"saved: {workdir}/deploy\n")


def test_convert_overwrites_nothing_where_the_forms_differ(run_command, workdir):
  before = tiny.contents(workdir)
  with pytest.raises(SystemExit) as stop:
    run_command("convert", "--workdir", workdir, "--tolerance", "1e-12")
  assert stop.value.code.startswith("error: the deploy form differs from the training form by")
  assert tiny.contents(workdir) == before


@pytest.mark.parametrize(
  ("name", "arguments"),
  [("convert", ()), ("recalibrate", ("--undo",)), ("recalibrate", ("--batches", 1))],
)
def test_a_folder_in_use_is_not_written_to(run_command, workdir, name, arguments):
  with lock.hold(workdir):
    before = tiny.contents(workdir)
    text = stop_of(run_command, name, "--workdir", workdir, *arguments)
    assert f"error: {workdir} is in use by process {os.getpid()} on" in text
    assert tiny.contents(workdir) == before


def test_evaluate_prints_a_row_for_each_form(run_command, finished):
  workdir, report, _ = finished
  header, *rows, last = run_command("evaluate", "--workdir", workdir).splitlines()
  assert header.split() == ["form", "parameters", "accuracy", "loss"]
  for row, form in zip(rows, ("train", "deploy"), strict=True):
    expected = [form, f"{report['parameters'][form]:,}", f"{report['accuracy'][form]:.2%}"]
    assert row.split()[:3] == expected
  assert last == "on every image of digits's test split, reloaded from disk"


def test_evaluate_prints_one_form_on_request(run_command, finished):
  printed = run_command("evaluate", "--workdir", finished[0], "--form", "deploy")
  assert [line.split()[0] for line in printed.splitlines()] == ["form", "deploy", "on"]


def test_evaluate_says_where_it_converts_in_memory(run_command, workdir):
  assert "in memory" not in run_command("evaluate", "--workdir", workdir)
  shutil.rmtree(workdir / "deploy")
  assert "deploy form converted in memory" in run_command("evaluate", "--workdir", workdir)
  assert not (workdir / "deploy").exists()


@pytest.mark.parametrize("name", ["convert", "evaluate"])
def test_a_folder_that_is_no_run_is_one_paragraph(run_command, tmp_path, name):
  with pytest.raises(SystemExit) as stop:
    run_command(name, "--workdir", tmp_path)
  assert stop.value.code.startswith(f"error: {tmp_path}/config.json does not exist; is")


@pytest.mark.parametrize("kind", ["train", "deploy"])
def test_import_weights_says_what_it_recognized_and_from_what(import_weights, checkpoint, kind):
  path = checkpoint(kind)
  workdir, printed = import_weights(path)
  parameters = json.loads((workdir / "import.json").read_text())["parameters"]
  *lines, last = printed.splitlines()
  assert lines == [
    f"recognized: repvgg_a0, timm names, {kind} form, 10 classes",
    f"parameters: {parameters:,}, from float32",
    "images: shorter side to 256 px, bilinear, central 224 px, "
    "mean [0.485, 0.456, 0.406], std [0.229, 0.224, 0.225]",
    f"file: {path.stat().st_size:,} bytes, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}",
  ]
  assert last.startswith(f"saved: {workdir}, in ")
  assert last.endswith(" MB of memory at most")


def test_import_weights_says_what_it_took_off_the_names(import_weights, tmp_path):
  state = cases.random_state("repvgg_a0", "train", "timm", **cases.TINY)
  np.savez(tmp_path / "a.npz", **{f"ema_model.{name}": value for name, value in state.items()})
  _, printed = import_weights(tmp_path / "a.npz", "--model", "repvgg_a0")
  assert "names: read without ema_model." in printed.splitlines()


def test_import_weights_of_a_prefix_offers_no_entry_without_a_name(import_weights, tmp_path):
  state = cases.random_state("repvgg_a0", "train", "timm", **cases.TINY)
  both = {**{f"image.model.{name}": x for name, x in state.items()}, "scale": np.ones(())}
  np.savez(tmp_path / "a.npz", **both)
  text = stop_of(import_weights, tmp_path / "a.npz", "--model", "repvgg_a0")
  assert "--entry image.model." in text
  assert "a different model" not in text  # the network is the named one
  _, printed = import_weights(tmp_path / "a.npz", "--entry", "image.model", "--model", "repvgg_a0")
  assert "entry: image.model" in printed.splitlines()


def test_import_weights_takes_another_number_of_classes(import_weights, checkpoint):
  path = checkpoint()
  arguments = ("--num-classes", 3, "--model", "repvgg_a1")
  text = stop_of(import_weights, path, *arguments)
  assert text.startswith("error: these weights do not fit repvgg_a1 (read as timm names, train")
  assert "--drop-head" in text
  workdir, printed = import_weights(path, *arguments, "--drop-head")
  first = "recognized: repvgg_a1, timm names, train form, 3 classes with a new classifier"
  assert printed.splitlines()[0] == first
  assert repjax.load(workdir)[2].num_classes == 3


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (("--model", "repvgg_a9"), "error: unknown model 'repvgg_a9'; did you mean"),
    (("--entry", "model"), "has no state dict called 'model'; it has: (the file itself)"),
    (("--overrides", "[1]"), "error: --overrides takes JSON such as"),
    (("--overrides", "{stage_sizes"), "error: --overrides takes JSON such as"),
    (
      ("--overrides", "{}"),
      "error: no model has tensors of the names and shapes of this state dict",
    ),
    (("--from", str(ROOT / "README.md")), "README.md cannot be read: it is a text, not a checkpo"),
    (("--from", "none.pth"), "error: none.pth does not exist; give the path of a checkpoint"),
  ],
  ids=str,
)
def test_import_weights_ends_with_one_paragraph_and_writes_nothing(
  import_weights, checkpoint, tmp_path, monkeypatch, arguments, said
):
  monkeypatch.setattr("repjax.weights.recognition.list_models", lambda: ["repvgg_a0"])
  path = checkpoint()
  assert said in stop_of(import_weights, path, *arguments)
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["train", "deploy"])
@pytest.mark.parametrize("naming", ["official", "timm"])
def test_export_weights_writes_what_import_weights_read(
  run_command, import_weights, checkpoint, tmp_path, kind, naming
):
  path, target = checkpoint(kind), tmp_path / "out.safetensors"
  workdir, _ = import_weights(path)
  to = ("--to", target, "--naming", naming, "--form", kind)
  printed = run_command("export-weights", "--workdir", workdir, *to)
  state, expected = weights.read(target), weights.read(path)
  size = target.stat().st_size
  assert printed == (
    f"{len(expected)} tensors, {kind} form, {naming} names, {size:,} bytes\nsaved: {target}\n"
  )
  found = weights.recognize(state, "repvgg_a0", **cases.TINY)
  assert found == ("repvgg_a0", naming, kind, 10)
  ours, theirs = (
    weights.from_torch("repvgg_a0", each, num_classes=10, **cases.TINY)
    for each in (state, expected)
  )
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  before = target.read_bytes()
  text = stop_of(run_command, "export-weights", "--workdir", workdir, *to)
  assert text.startswith(f"error: {target} exists already")
  assert target.read_bytes() == before


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_export_weights_of_a_run(run_command, finished, tmp_path, form):
  target = tmp_path / "out.safetensors"
  run_command("export-weights", "--workdir", finished[0], "--to", target, "--form", form)
  _, variables, spec = repjax.load(finished[0], deploy=form == "deploy")
  back = weights.from_torch(spec.name, weights.read(target), num_classes=10, **spec.overrides)
  jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_an_import_is_compared_on_noise_and_then_evaluated(run_command, import_weights, checkpoint):
  workdir, _ = import_weights(checkpoint())
  before = tiny.contents(workdir)
  text = stop_of(run_command, "convert", "--workdir", workdir, "--tolerance", "1e-12")
  assert text.startswith("error: the deploy form differs from the training form by")
  assert "over 16 images" in text
  assert tiny.contents(workdir) == before
  printed = run_command("convert", "--workdir", workdir)
  assert "16 of 16 noise images" in printed
  assert "accuracy" not in printed
  report = json.loads((workdir / "deploy" / "report.json").read_text())
  assert (report["dataset"], report["images"], report["step"]) == ("synthetic", 16, 0)
  assert 0 < report["logits_difference"] <= 1e-5

  noise = ("--dataset", "synthetic", "--split", "sample")
  header, *rows, last = run_command("evaluate", "--workdir", workdir, *noise).splitlines()
  assert header.split() == ["form", "parameters", "accuracy", "loss"]
  for row, form in zip(rows, ("train", "deploy"), strict=True):
    assert row.split()[:2] == [form, f"{report['parameters'][form]:,}"]
    assert row.split()[2] == f"{report['accuracy'][form]:.2%}"
  assert last == "on every image of synthetic's sample split, which is noise"


def test_an_import_is_compared_on_named_images(run_command, import_weights, checkpoint):
  workdir, _ = import_weights(checkpoint())
  named = ("--dataset", "synthetic", "--split", "validation")
  printed = run_command("convert", "--workdir", workdir, *named)
  assert "128 of 128 noise images" in printed


def test_an_import_of_the_deploy_form_is_evaluated_as_such(run_command, import_weights, checkpoint):
  workdir, _ = import_weights(checkpoint("deploy"))
  noise = ("--dataset", "synthetic", "--split", "sample")
  printed = run_command("evaluate", "--workdir", workdir, *noise)
  assert [line.split()[0] for line in printed.splitlines()] == ["form", "deploy", "on"]
  for form in ("both", "train"):
    text = stop_of(run_command, "evaluate", "--workdir", workdir, *noise, "--form", form)
    assert text.startswith(f"error: {workdir} holds a deploy form only")
  before = tiny.contents(workdir)
  text = stop_of(run_command, "convert", "--workdir", workdir)
  assert text.startswith(f"error: {workdir} holds a deploy form only")
  assert tiny.contents(workdir) == before


def test_evaluate_asks_for_a_data_set_where_an_import_names_none(
  run_command, import_weights, checkpoint
):
  workdir, _ = import_weights(checkpoint("deploy"))
  text = stop_of(run_command, "evaluate", "--workdir", workdir)
  assert text.startswith("error: no data set is named")
