"""`metrics.jsonl` and the live line."""

import io
import json
import re
import types

import pytest

from repjax.training import metrics
from repjax.training.metrics import MetricsFile, Progress

pytest_plugins = ["tests.training.fixtures"]


def write(path, first_step, *steps):
  records = MetricsFile(path, first_step)
  for step in steps:
    records.write(step=step, loss=step / 2)
  records.close()


def steps_in(path):
  return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_record_is_a_line_of_json(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write(path, 0, 1, 2)
  assert path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 1.0}\n'


def test_a_record_is_on_disk_as_soon_as_it_is_written(tmp_path):
  records = MetricsFile(tmp_path / "metrics.jsonl", 0)
  records.write(step=1)
  assert steps_in(tmp_path / "metrics.jsonl") == [1]
  records.close()


def test_a_run_that_continues_drops_what_lies_behind_its_step(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write(path, 0, 2, 4, 4, 5, 8)
  write(path, 4, 6)
  assert steps_in(path) == [2, 4, 4, 6]


def test_a_run_that_begins_again_drops_everything(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write(path, 0, 2, 4)
  write(path, 0)
  assert path.read_text() == ""


@pytest.mark.parametrize("cut", ['{"step": 4, "lo', '{"step"', "4", "{}", "\x00\x00"])
def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path, cut):
  path = tmp_path / "metrics.jsonl"
  write(path, 0, 2, 4)
  path.write_text(path.read_text() + cut)
  write(path, 4, 6)
  assert steps_in(path) == [2, 4, 6]


def test_of_one_step_as_many_records_are_kept_as_were_there(tmp_path, capsys):
  path = tmp_path / "metrics.jsonl"
  write(path, 0, 2, 4, 4)
  records = MetricsFile(path, 4, 2)
  assert records.count == 2
  records.write(step=4)
  assert records.count == 3
  records.close()
  assert steps_in(path) == [2, 4, 4]
  assert capsys.readouterr().out == ""
  MetricsFile(path, 4, 5).close()
  assert f"{path} lacks 2 records; the run goes on without them" in capsys.readouterr().out


def test_no_other_file_is_left(tmp_path):
  write(tmp_path / "metrics.jsonl", 0, 1)
  write(tmp_path / "metrics.jsonl", 1, 2)
  assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


class Terminal(io.StringIO):
  """What a person sees on a terminal: a carriage return goes back, and text overwrites."""

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
  monkeypatch.setattr(metrics, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
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
  assert progress.update(22, 1.0, 0.0, 6.5) == metrics.Pace(images=64, seconds=2.0, waited=0.5)


def finished(clock, waited, out=None):
  """The last lines of a run of 85 s after its first step, which waited for 7 s."""
  out = out or io.StringIO()
  progress = Progress(0, 100, 10, out)
  progress.update(1, 1.0, 0.0, 7.0)
  clock.now += 40
  progress.note("evaluation", seconds=15)
  progress.update(50, 1.0, 0.0, 7.0 + waited / 3)
  clock.now += 60
  progress.update(100, 1.0, 0.0, 7.0 + waited)
  progress.note("evaluation", seconds=15)
  progress.finish()
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
  progress.finish()
  assert "waited" not in out.getvalue()
