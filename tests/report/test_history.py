"""What a run wrote, read back as curves."""

import json
from pathlib import Path

import numpy as np
import pytest

from repjax.errors import InputError
from repjax.report.history import Curve, distinct_names, read_history, thinned, value_at

pytest_plugins = ["tests.training.fixtures"]


def write(workdir, *lines, file="metrics.jsonl"):
  workdir.mkdir(exist_ok=True)
  texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
  (workdir / file).write_text("\n".join(texts) + "\n")
  return workdir


def points(history, name):
  curve = history.curves[name]
  return list(zip(curve.steps.tolist(), curve.values.tolist()))


def test_each_name_becomes_a_curve(tmp_path):
  write(
    tmp_path / "run",
    {"step": 2, "loss": 2.5, "learning_rate": 0.1},
    {"step": 4, "loss": 2, "learning_rate": 0.2},
    {"step": 4, "eval_loss": 2.25, "eval_ema_loss": 1.0},
  )
  history = read_history(tmp_path / "run")
  assert (history.name, history.title, history.batch_size) == ("run", "", None)
  assert history.curves.keys() == {"loss", "learning_rate", "eval_loss", "eval_ema_loss"}
  assert points(history, "loss") == [(2, 2.5), (4, 2.0)]
  assert points(history, "learning_rate") == [(2, 0.1), (4, 0.2)]
  assert points(history, "eval_ema_loss") == [(4, 1.0)]
  assert history.best is None
  assert history.notes == ()


def test_a_finished_run_has_all_curves(finished):
  history = read_history(finished[0], "mine")
  assert (history.name, history.title) == ("mine", "repvgg_a0 on digits")
  assert history.batch_size == 32
  assert history.best == finished[1]["step"]
  assert history.notes == ()
  trained = [3, 4, 6, 8, 9, 12]
  steps = {name: curve.steps.tolist() for name, curve in history.curves.items()}
  assert steps.pop("eval_loss") == steps.pop("eval_accuracy") == [4, 8, 12]
  names = ("loss", "accuracy", "learning_rate", "images_per_second", "waiting", "seconds")
  assert steps == dict.fromkeys(names, trained)
  assert (history.curves["images_per_second"].values > 0).all()
  assert (history.curves["waiting"].values >= 0).all()
  assert (history.curves["waiting"].values <= 1).all()


def test_speed_is_worked_out_from_what_was_timed(tmp_path):
  write(
    tmp_path,
    {"step": 10, "images": 640, "seconds": 2.0, "waited": 0.5},
    {"step": 11, "images": 64, "seconds": 0.0, "waited": 0.0},
    {"step": 20, "images": 576, "seconds": 4.0, "waited": 0.0},
    file="timing.jsonl",
  )
  history = read_history(tmp_path)
  assert points(history, "images_per_second") == [(10, 320.0), (20, 144.0)]
  assert points(history, "waiting") == [(10, 0.25), (20, 0.0)]
  assert points(history, "seconds") == [(10, 2.0), (20, 4.0)]


@pytest.mark.parametrize(
  "damaged",
  [
    '{"step": 4, "lo',
    "[4, 2.0]",
    "null",
    '{"loss": 2.0}',
    '{"step": "4", "loss": 2.0}',
    '{"step": 4, "loss": NaN}',
    '{"step": 4, "loss": "2.0"}',
    "\x00\x00",
    "",
  ],
)
def test_damaged_lines_are_left_out_and_counted(tmp_path, damaged):
  write(tmp_path, {"step": 2, "loss": 2.5}, damaged, {"step": 6, "loss": 2.0})
  history = read_history(tmp_path)
  assert points(history, "loss") == [(2, 2.5), (6, 2.0)]
  assert history.notes == (f"{tmp_path}/metrics.jsonl: 1 damaged line left out",)


def test_damaged_lines_of_both_files_are_told_apart(tmp_path):
  write(tmp_path, "x", "y")
  write(tmp_path, "z", file="timing.jsonl")
  (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\n{\n")
  assert read_history(tmp_path).notes == (
    f"{tmp_path}/metrics.jsonl: 2 damaged lines left out",
    f"{tmp_path}/timing.jsonl: 1 damaged line left out",
  )


def test_a_folder_without_these_files_has_no_curves(tmp_path):
  (tmp_path / "config.json").write_text('{"model": "m", "dataset": "d", "batch_size": 64}')
  history = read_history(tmp_path)
  assert (history.curves, history.best, history.notes) == ({}, None, ())
  assert (history.title, history.batch_size) == ("", None)


def test_a_damaged_config_is_an_error(tmp_path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(InputError, match=r"config\.json is damaged"):
    read_history(tmp_path)


@pytest.mark.parametrize(
  ("accuracies", "best"), [((0.5, 0.9, 0.7), 20), ((0.9, 0.5, 0.9), 30), ((0.1,), 10)]
)
def test_the_best_evaluation_is_the_last_of_the_most_accurate(tmp_path, accuracies, best):
  rows = [{"step": 10 * (i + 1), "eval_accuracy": value} for i, value in enumerate(accuracies)]
  history = read_history(write(tmp_path, *rows))
  assert history.best == best
  assert value_at(history.curves["eval_accuracy"], history.best) == max(accuracies)


def test_a_value_that_was_not_recorded_is_none():
  curve = Curve(np.asarray([1, 3, 3]), np.asarray([0.1, 0.2, 0.3]))
  assert (value_at(curve, 1), value_at(curve, 3)) == (0.1, 0.3)
  assert value_at(curve, 2) is value_at(None, 1) is value_at(curve, None) is None


@pytest.mark.parametrize("length", [1, 9, 10, 11, 25, 30, 31])
def test_a_long_curve_is_thinned_to_means_of_neighbours(length):
  curve = Curve(np.arange(1, length + 1), np.random.default_rng(0).standard_normal(length))
  thin = thinned(curve, most=10)
  size = -(-length // 10)
  groups = [slice(start, start + size) for start in range(0, length, size)]
  assert len(thin.steps) == len(groups) <= 10
  assert thin.steps.tolist() == [curve.steps[group][-1] for group in groups]
  np.testing.assert_allclose(thin.values, [curve.values[group].mean() for group in groups])


@pytest.mark.parametrize(
  ("folders", "names"),
  [
    (["/runs/a", "/runs/b"], ["a", "b"]),
    (["/one/run", "/two/run", "/two/other"], ["one/run", "two/run", "two/other"]),
    (["/x/a/run/", "/y/a/run"], ["x/a/run", "y/a/run"]),
    (["/run", "/x/run"], ["run", "x/run"]),
    (["/runs/a"], ["a"]),
  ],
)
def test_folders_get_the_shortest_names_that_differ(folders, names):
  assert distinct_names([Path(folder) for folder in folders]) == names


def test_the_current_folder_has_a_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert distinct_names([Path(".")]) == [tmp_path.name]
  assert read_history(Path(".")).name == tmp_path.name
