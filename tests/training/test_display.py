"""The live line, `timing.jsonl`, and event files as TensorBoard reads them."""

import importlib.util
import io
import json
import re
import types

import pytest

from repjax import training
from repjax.errors import InputError
from repjax.training import display
from repjax.training.display import Pace, Progress, Watch
from tests.training import tiny
from tests.training.boards import shown

pytest_plugins = ["tests.training.fixtures"]


class Terminal(io.StringIO):
  """A terminal: a carriage return goes back to the start of a line, and text overwrites."""

  def isatty(self):
    return True

  def screen(self):
    lines = []
    for line in self.getvalue().split("\n"):
      shown = ""
      for text in line.split("\r"):
        shown = text + shown[len(text) :]
      lines.append(shown.rstrip())
    return lines


@pytest.fixture
def clock(monkeypatch):
  """A clock that stands still until it is set."""
  clock = types.SimpleNamespace(now=100.0)
  monkeypatch.setattr(display, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
  return clock


def test_elsewhere_than_on_a_terminal_each_update_is_a_line(clock):
  out = io.StringIO()
  progress = Progress(0, 76, 8, out)
  progress.update(1, 2.34567, 0.25, 3.0)
  clock.now += 10
  progress.update(11, 1.5, 1.0, 3.3)
  assert out.getvalue().splitlines() == [
    "step 1/76  loss 2.3457  accuracy 25.00%",
    "step 11/76  loss 1.5000  accuracy 100.00%  8 images/s  data 3%  1:05 left",
  ]


def test_a_terminals_line_is_rewritten_in_place_and_a_note_stays(clock):
  out = Terminal()
  progress = Progress(0, 100, 1000, out)
  progress.update(1, 2.0, 0.5, 0.0)
  clock.now += 1
  progress.update(2, 1.0, 0.5, 0.0)
  assert out.screen() == [
    "step 2/100  loss 1.0000  accuracy 50.00%  1,000 images/s  data 0%  1:38 left"
  ]
  progress.note("short")
  assert out.screen() == ["short", ""]
  clock.now += 1
  progress.update(3, 1.0, 0.5, 0.0)
  assert [line.split("  ")[0] for line in out.screen()] == ["short", "step 3/100"]


def test_time_that_was_not_training_does_not_slow_the_rate(clock):
  out = io.StringIO()
  progress = Progress(0, 100, 10, out)
  progress.update(1, 1.0, 0.0, 0.0)
  clock.now += 5
  progress.note("evaluation", seconds=3)
  progress.update(3, 1.0, 0.0, 0.0)
  assert "10 images/s" in out.getvalue()


def test_time_before_the_first_update_is_not_counted(clock):
  out = io.StringIO()
  progress = Progress(40, 100, 10, out)
  clock.now += 1000
  progress.note("evaluation", seconds=500)
  progress.update(41, 1.0, 0.0, 0.0)
  clock.now += 4
  progress.update(43, 1.0, 0.0, 0.0)
  assert "5 images/s  data 0%  1:54 left" in out.getvalue()


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (0, "0:00"),
    (5, "0:05"),
    (75, "1:15"),
    (3599, "59:59"),
    (3599.6, "1:00:00"),
    (36754, "10:12:34"),
  ],
)
def test_time_left_reads_as_a_clock(clock, seconds, text):
  out = io.StringIO()
  progress = Progress(0, 3, 1, out)
  progress.update(1, 1.0, 0.0, 0.0)
  clock.now += seconds or 1e-9
  progress.update(2, 1.0, 0.0, 0.0)
  assert out.getvalue().endswith(f"  {text} left\n")


def test_the_live_line_shows_the_wait_since_the_last_update(clock):
  out = io.StringIO()
  progress = Progress(0, 100, 10, out)
  progress.update(1, 1.0, 0.0, 0.0)
  for step, waited in ((2, 0.5), (3, 0.5), (4, 3.0)):
    clock.now += 2
    progress.note("evaluation", seconds=1.5)
    clock.now += 3.5
    progress.update(step, 1.0, 0.0, waited)
  assert re.findall(r"data (\S+) ", out.getvalue()) == ["12%", "0%", "62%"]


def test_an_update_returns_the_pace_since_the_one_before(clock):
  progress = Progress(10, 100, 64, io.StringIO())
  assert progress.update(11, 1.0, 0.0, 5.0) is None
  assert progress.update(11, 1.0, 0.0, 5.0) is None
  clock.now += 4
  assert progress.update(21, 1.0, 0.0, 6.0) == (640, 4.0, 1.0)
  clock.now += 5
  progress.note("evaluation", seconds=3)
  assert progress.update(22, 1.0, 0.0, 6.5) == display.Pace(images=64, seconds=2.0, waited=0.5)


def finished(clock, waited, out=None):
  """Returns the last lines of a run of 85 s after its first step, which waited for 7 s."""
  out = out or io.StringIO()
  progress = Progress(0, 100, 10, out)
  progress.update(1, 1.0, 0.0, 7.0)
  clock.now += 40
  progress.note("evaluation", seconds=15)
  progress.update(50, 1.0, 0.0, 7.0 + waited / 3)
  clock.now += 60
  progress.update(100, 1.0, 0.0, 7.0 + waited)
  progress.note("evaluation", seconds=15)
  progress.show_data_waiting()
  return out.getvalue().splitlines()


def test_the_end_of_training_says_how_long_steps_waited(clock):
  assert finished(clock, 1.2)[-1] == "steps waited 1.2 s of 85.0 s for data (1.4%)"


def test_much_waiting_is_followed_by_what_helps(clock):
  assert finished(clock, 8.4)[-1] == "steps waited 8.4 s of 85.0 s for data (9.9%)"
  wait, advice = finished(clock, 42.5)[-2:]
  assert wait == "steps waited 42.5 s of 85.0 s for data (50.0%)"
  assert advice.startswith("data limits the speed: more --config.num_workers")


def test_a_terminal_keeps_the_last_lines(clock):
  lines = finished(clock, 42.5, out := Terminal())
  assert len(lines) > 0
  assert [line.split(" ")[0] for line in out.screen()] == [
    *("evaluation", "evaluation", "steps", "data", ""),
  ]


@pytest.mark.parametrize("updates", [0, 1, 2])
def test_a_run_of_one_step_has_nothing_to_say_about_waiting(clock, updates):
  out = io.StringIO()
  progress = Progress(0, 1, 10, out)
  for _ in range(updates):
    progress.update(1, 1.0, 0.0, 1.0)
    clock.now += 1
  progress.show_data_waiting()
  assert "waited" not in out.getvalue()


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


def test_timing_after_the_step_at_which_a_run_continues_is_dropped(tmp_path):
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
  with pytest.raises(InputError, match=r"tensorboardX .*'repjax\[tensorboard\]'"):
    training.train(tiny.config(digits_dir, tensorboard=True), tmp_path / "run")
  assert not (tmp_path / "run").exists()
