"""`timing.jsonl`, and TensorBoard's files as TensorBoard reads them."""

import importlib.util
import json

import pytest

from repjax import training
from repjax.errors import InputError
from repjax.training.metrics import Pace
from repjax.training.watch import Watch
from tests.training import tiny
from tests.training.boards import shown

pytest_plugins = ["tests.training.fixtures"]


def lines(workdir):
  return [json.loads(line) for line in (workdir / "timing.jsonl").read_text().splitlines()]


def test_the_pace_is_a_line_and_values_are_not(tmp_path):
  watch = Watch(tmp_path, 0, tensorboard=False)
  watch.write(10, {"loss": 2.0}, Pace(640, 2.5, 0.5))
  watch.write(10, {"eval_loss": 1.0})
  watch.write(20, {"loss": 2.0}, Pace(640, 2.0, 0.25))
  assert lines(tmp_path) == [
    {"step": 10, "images": 640, "seconds": 2.5, "waited": 0.5},
    {"step": 20, "images": 640, "seconds": 2.0, "waited": 0.25},
  ]
  watch.close()
  assert [path.name for path in tmp_path.iterdir()] == ["timing.jsonl"]


def test_a_run_that_continues_drops_what_lies_behind_its_step(tmp_path):
  for first, steps in ((0, (5, 10, 15)), (10, (20,))):
    watch = Watch(tmp_path, first, tensorboard=False)
    for step in steps:
      watch.write(step, {}, Pace(64, 1.0, 0.0))
    watch.close()
  assert [row["step"] for row in lines(tmp_path)] == [5, 10, 20]


def test_scalars_have_clear_tags(tmp_path):
  watch = Watch(tmp_path, 0, tensorboard=True)
  watch.write(10, {"loss": 2.0, "learning_rate": 0.5}, Pace(640, 2.5, 0.5))
  watch.write(10, {"eval_accuracy": 0.25, "eval_ema_accuracy": 0.75})
  # On disk as soon as it is written, not when the run ends.
  assert shown(tmp_path / "tensorboard") == {
    "train/loss": [(10, 2.0)],
    "train/learning_rate": [(10, 0.5)],
    "speed/images_per_second": [(10, 256.0)],
    "speed/share_waiting_for_data": [(10, pytest.approx(0.2))],
    "eval/accuracy": [(10, 0.25)],
    "eval/ema_accuracy": [(10, 0.75)],
  }
  watch.close()


@pytest.mark.parametrize("first_step", [0, 4])
def test_a_run_that_continues_shows_no_step_twice(tmp_path, first_step):
  for first, steps, loss in ((0, (2, 4, 6, 8), 2.0), (first_step, (6, 8, 10), 1.0)):
    watch = Watch(tmp_path, first, tensorboard=True)
    for step in steps:
      watch.write(step, {"loss": loss})
    watch.close()
  kept = [(step, 2.0) for step in (2, 4) if step <= first_step]
  expected = [*kept, (6, 1.0), (8, 1.0), (10, 1.0)]
  assert shown(tmp_path / "tensorboard") == {"train/loss": expected}
  assert len(list((tmp_path / "tensorboard").iterdir())) in (1, 2)


def test_a_missing_package_is_said_before_anything_begins(digits_dir, tmp_path, monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    "importlib.util.find_spec", lambda name: None if name == "tensorboardX" else find(name)
  )
  with pytest.raises(InputError, match="pip install tensorboardX"):
    training.train(tiny.config(digits_dir, tensorboard=True), tmp_path / "run")
  assert not (tmp_path / "run").exists()
