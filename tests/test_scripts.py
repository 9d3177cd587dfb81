"""The command lines over the package."""

import json
import runpy
import shutil

import pytest

import repjax.models
from repjax.models.repvgg import RepVGG
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]
pytestmark = pytest.mark.usefixtures("quick_programs")


@pytest.fixture
def run_script(monkeypatch, capsys):
  """Runs a script in this process; what it printed, or the text it ended with."""

  def run(name, *arguments):
    path = str(tiny.ROOT / "scripts" / f"{name}.py")
    monkeypatch.setattr("sys.argv", [path, *map(str, arguments)])
    capsys.readouterr()
    runpy.run_path(path, run_name="__main__")
    return capsys.readouterr().out

  return run


@pytest.fixture
def workdir(finished, tmp_path):
  """A copy of a finished run."""
  return shutil.copytree(finished[0], tmp_path / "run")


def test_reparameterize_makes_the_deploy_form_again(run_script, workdir, finished):
  shutil.rmtree(workdir / "deploy")
  printed = run_script("reparameterize", "--workdir", workdir)
  assert json.loads((workdir / "deploy" / "report.json").read_text()) == finished[1]
  assert "360 of 360 images" in printed
  assert printed.endswith(f"saved: {workdir}/deploy\n")


def test_reparameterize_overwrites_nothing_where_the_forms_differ(run_script, workdir):
  before = tiny.contents(workdir)
  with pytest.raises(SystemExit) as stop:
    run_script("reparameterize", "--workdir", workdir, "--tolerance", "1e-12")
  assert stop.value.code.startswith("error: the deploy form differs from the training form by")
  assert tiny.contents(workdir) == before


def test_evaluate_prints_a_row_for_each_form(run_script, finished):
  workdir, report, _ = finished
  header, *rows, last = run_script("evaluate", "--workdir", workdir).splitlines()
  assert header.split() == ["form", "parameters", "accuracy", "loss"]
  for row, form in zip(rows, ("train", "deploy"), strict=True):
    expected = [form, f"{report['parameters'][form]:,}", f"{report['accuracy'][form]:.2%}"]
    assert row.split()[:3] == expected
  assert last == "on every image of digits's test split, reloaded from disk"


def test_evaluate_prints_one_form_on_request(run_script, finished):
  printed = run_script("evaluate", "--workdir", finished[0], "--form", "deploy")
  assert [line.split()[0] for line in printed.splitlines()] == ["form", "deploy", "on"]


@pytest.mark.parametrize("name", ["reparameterize", "evaluate"])
def test_a_folder_that_is_no_run_is_one_paragraph(run_script, tmp_path, name):
  with pytest.raises(SystemExit) as stop:
    run_script(name, "--workdir", tmp_path)
  assert stop.value.code.startswith(f"error: {tmp_path}/config.json does not exist; is")


def test_benchmark_times_both_forms(run_script, tmp_path, monkeypatch):
  monkeypatch.setitem(repjax.models._MODELS, "tiny", (RepVGG, tiny.OVERRIDES))
  path = tmp_path / "results" / "file.json"
  sizes = ("--models", "tiny", "--batch-sizes", 1, 2, "--image-size", 16)
  printed = run_script("benchmark", *sizes, "--repeats", 2, "--rounds", 3, "--json", path)
  rows = [line.split() for line in printed.splitlines() if line.startswith("tiny")]
  assert [row[:2] for row in rows] == [["tiny", "1"], ["tiny", "2"]]
  written = json.loads(path.read_text())
  facts = [written[name] for name in ("image_size", "repeats", "rounds", "dtype")]
  assert facts == [16, 2, 3, "float32"]
  for result, batch_size in zip(written["results"], (1, 2), strict=True):
    assert (result["model"], result["batch_size"]) == ("tiny", batch_size)
    assert min(result["train_ms"], result["deploy_ms"], result["ratio"]) > 0
    assert len(result["ratio_of_each_repeat"]) == 2


def test_benchmark_of_an_unknown_model_is_one_paragraph(run_script):
  with pytest.raises(SystemExit) as stop:
    run_script("benchmark", "--models", "repvgg_a9")
  assert stop.value.code.startswith("error: unknown model 'repvgg_a9'; did you mean")
