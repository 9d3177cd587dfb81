"""What a run writes about itself: `metrics.jsonl` and the live line."""

import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from repjax import disk

_MUCH_WAITING = 0.1
_MORE_DATA = (
  "data limits the speed: more --config.num_workers (processes that decode and augment), a faster "
  "disk, or images stored smaller help"
)


class MetricsFile:
  """`metrics.jsonl`: one JSON object a line, only values that another run would reproduce.

  Attributes:
    count: how many lines it has.
  """

  def __init__(self, path: Path, first_step: int, count: int | None = None):
    """Opens the file for a run that continues, dropping what lies behind the point where it does.

    Args:
      path: of the file.
      first_step: records of later steps are dropped.
      count: of lines to keep, where it is known.

    Raises:
      InputError: the file cannot be written.
    """
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    kept = [line for line in lines if _step_of(line) <= first_step][:count]
    if count is not None and len(kept) < count:
      print(f"{path} lacks {count - len(kept)} records; the run goes on without them", flush=True)
    draft = path.with_suffix(".draft")
    with disk.writing(path):
      draft.write_text("".join(f"{line}\n" for line in kept))
      disk.put(draft, path)
      self._file = path.open("ab", buffering=0)
    self._path, self.count = path, len(kept)

  def write(self, **values: Any) -> None:
    """Appends one record.

    Raises:
      InputError: it cannot be written.
    """
    line = f"{json.dumps(values)}\n".encode()
    with disk.writing(self._path):
      if self._file.write(line) != len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    self.count += 1

  def sync(self) -> None:
    """Waits until all records are on the disk itself."""
    with disk.writing(self._path):
      os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def _step_of(line: str) -> float:
  """The step of a record; infinity for a line that a crash cut short."""
  try:
    return json.loads(line)["step"]
  except (ValueError, KeyError, TypeError):
    return float("inf")


class _Mark(NamedTuple):
  """Where training was at an update: steps done, seconds of training, seconds without data."""

  step: int
  seconds: float
  waited: float


class Pace(NamedTuple):
  """How a stretch of training went, without compilation and evaluation.

  Attributes:
    images: that were trained on, over all devices.
    seconds: that it took.
    waited: seconds of those in which the devices had nothing to do for lack of data.
  """

  images: int
  seconds: float
  waited: float


class Progress:
  """The live line: step, loss, accuracy, images per second, wait for data, time left.

  On a terminal it is rewritten in place; elsewhere each update is a line. The clock starts with the
  first update, so that compilation is not counted as speed.
  """

  def __init__(self, first_step: int, total_steps: int, batch_size: int, out: TextIO | None = None):
    self._total, self._batch, self._out = total_steps, batch_size, out or sys.stdout
    self._live = self._out.isatty()
    self._width = 0
    self._paused = 0.0
    self._start = self._last = None

  def update(self, step: int, loss: float, accuracy: float, waited: float) -> Pace | None:
    """Shows where training is.

    Args:
      step: that was done last.
      loss: mean over the steps since the last update.
      accuracy: likewise.
      waited: seconds since the run began in which the devices had nothing to do for lack of data.

    Returns:
      The pace since the last update; None at the first, and where no step was done since.
    """
    now = _Mark(step, time.perf_counter() - self._paused, waited)
    text = f"step {step}/{self._total}  loss {loss:.4f}  accuracy {accuracy:6.2%}"
    pace = None
    if self._start is None or self._last is None:
      self._start = self._last = now
    elif step > self._last.step:
      rate = (step - self._start.step) / (now.seconds - self._start.seconds)
      text += f"  {rate * self._batch:,.0f} images/s  data {_share_waited(self._last, now):.0%}"
      text += f"  {_clock((self._total - step) / rate)} left"
      images = (step - self._last.step) * self._batch
      pace = Pace(images, now.seconds - self._last.seconds, waited - self._last.waited)
      self._last = now
    self._show(text, keep=False)
    return pace

  def finish(self) -> None:
    """Says for how long steps waited for data, and what helps where that was much."""
    if self._start is None or self._last is None or self._start == self._last:
      return
    share = _share_waited(self._start, self._last)
    text = (
      f"steps waited {self._last.waited - self._start.waited:.1f} s of "
      f"{self._last.seconds - self._start.seconds:.1f} s for data ({share:.1%})"
    )
    if share > _MUCH_WAITING:
      text += f"\n{_MORE_DATA}"
    self._show(text, keep=True)

  def note(self, text: str, seconds: float = 0.0) -> None:
    """Shows a line that stays; `seconds` of work that was not training do not slow the rate."""
    if self._start is not None:
      self._paused += seconds
    self._show(text, keep=True)

  def _show(self, text: str, keep: bool) -> None:
    if self._live:
      self._out.write("\r" + text.ljust(self._width) + ("\n" if keep else ""))
      self._width = 0 if keep else len(text)
    else:
      self._out.write(text + "\n")
    self._out.flush()


def _share_waited(since: _Mark, now: _Mark) -> float:
  """Which part of the time between two marks the devices waited for data."""
  return (now.waited - since.waited) / (now.seconds - since.seconds)


def _clock(seconds: float) -> str:
  """75 as 1:15, 3675 as 1:01:15."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
