"""Displays of a run in progress: the live line, `timing.jsonl`, and TensorBoard."""

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from repjax import disk, extras, runs
from repjax.config import Config

_MUCH_WAITING = 0.1
_MORE_DATA = (
  "data limits the speed: more --config.num_workers (processes that decode and augment), a faster "
  "disk, or images stored smaller help"
)


class _Mark(NamedTuple):
  """A point in training: steps done, seconds of training, seconds of waiting for data."""

  step: int
  seconds: float
  waited: float


class Pace(NamedTuple):
  """The speed of a stretch of training, without compilation and evaluation.

  Attributes:
    images: number of images trained on, over all devices.
    seconds: duration.
    waited: the part of `seconds` in which the devices had nothing to do for lack of data.
  """

  images: int
  seconds: float
  waited: float


class Progress:
  """The live line: step, loss, accuracy, images per second, wait for data, time left.

  On a terminal the line is rewritten in place; elsewhere each update is a new line. The clock
  starts with the first update, so that compilation does not count as training.
  """

  def __init__(self, first_step: int, total_steps: int, batch_size: int, out: TextIO | None = None):
    """Prepares the line; nothing is shown yet.

    Args:
      first_step: number of steps that were done before.
      total_steps: number of steps of the whole run.
      batch_size: images in a step, over all devices.
      out: where to write; None: stdout.
    """
    self._total, self._batch, self._out = total_steps, batch_size, out or sys.stdout
    self._live = self._out.isatty()
    self._width = 0  # of the text that stands on the live line
    self._paused = 0.0  # seconds that were not training
    self._start = self._last = None

  def update(self, step: int, loss: float, accuracy: float, waited: float) -> Pace | None:
    """Shows how far training is.

    Args:
      step: the last step that was done.
      loss: mean over the steps since the last update.
      accuracy: mean over the same steps.
      waited: seconds since the run began in which the devices had nothing to do for lack of data.

    Returns:
      The pace since the last update; None at the first update, and where no step was done since.
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

  def show_data_waiting(self) -> None:
    """Shows how long the steps waited for data, and what helps if they waited much."""
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
    """Shows a line that stays.

    Args:
      text: the line.
      seconds: duration of work that was not training, which the speed leaves out.
    """
    self.pause(seconds)
    self._show(text, keep=True)

  def pause(self, seconds: float) -> None:
    """Leaves a time that was not training out of the speed."""
    if self._start is not None:
      self._paused += seconds

  def _show(self, text: str, keep: bool) -> None:
    """Writes a text over the live line, or as a line of a log."""
    if self._live:
      self._out.write("\r" + text.ljust(self._width) + ("\n" if keep else ""))
      self._width = 0 if keep else len(text)
    else:
      self._out.write(text + "\n")
    self._out.flush()


def _share_waited(since: _Mark, now: _Mark) -> float:
  """Returns the share of the time between two marks in which the devices waited for data."""
  return (now.waited - since.waited) / (now.seconds - since.seconds)


def _clock(seconds: float) -> str:
  """Returns a duration as a clock shows it: 75 as 1:15, 3675 as 1:01:15."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def named(metric: str, value: float) -> str:
  """Returns a metric in words: "accuracy 92.50%", "loss 0.2513"."""
  return f"loss {value:.4f}" if metric == "loss" else f"{title(metric)} {value:.2%}"


def title(metric: str) -> str:
  """Returns the name of a metric as people write it."""
  return {"miou": "mIoU"}.get(metric, metric)


def views(config: Config) -> str:
  """Returns what an evaluation of a segmentation averages over, to end a sentence about images."""
  text = f", in windows of {config.eval_window} px" if config.get("eval_window") else ""
  return text + ", averaged with its mirror image" * bool(config.get("eval_flip"))


class Watch:
  """A record of the speed of training, and everything that TensorBoard shows.

  `timing.jsonl` has a line for each stretch of training: `step` at its end, and the fields of
  `Pace`. No other run would reproduce these values, so they are not in `metrics.jsonl`. TensorBoard
  reads `workdir/tensorboard`.
  """

  def __init__(self, workdir: Path, first_step: int, *, tensorboard: bool):
    """Opens the files for a run that continues after `first_step`; later records are dropped."""
    self._timing = runs.RecordsFile(runs.timing_file(workdir), first_step)
    folder = runs.tensorboard_folder(workdir)
    self._board = _EventFile(folder, first_step) if tensorboard else None

  def write(self, step: int, values: dict[str, float], pace: Pace | None = None) -> None:
    """Records the values of a line of `metrics.jsonl`, and the pace of the steps before it."""
    if pace is not None:
      self._timing.write(step=step, **pace._asdict())
    if self._board is not None:
      self._board.write(step, {**_tagged(values), **_speed(pace)})

  def close(self) -> None:
    """Closes the files."""
    self._timing.close()
    if self._board is not None:
      self._board.close()


class _EventFile:
  """A file for TensorBoard. Each value is in the file when `write` returns.

  tensorboardX's own SummaryWriter hands values to a thread. If the process were killed, the values
  in the thread's queue would be lost, and a run that continues would not write them again.
  """

  def __init__(self, folder: Path, first_step: int):
    """Opens a new file in `folder` for the steps after `first_step`."""
    from tensorboardX import event_file_writer
    from tensorboardX.proto import event_pb2, summary_pb2

    self._protos: Any = event_pb2, summary_pb2
    self._folder = folder
    with disk.writing(folder):
      folder.mkdir(exist_ok=True)
    # TensorBoard reads files in the order of their names, which begin with the time in seconds.
    # Where a file says that a session starts at a step, TensorBoard drops what earlier files say
    # about this step and later ones. So no step is shown twice.
    with disk.writing(folder):
      self._file = event_file_writer.EventsWriter(str(folder / "events"), f".{first_step:09}")
    start = self._protos[0].SessionLog(status=self._protos[0].SessionLog.START)
    self._write(step=first_step + 1, session_log=start)

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Records a value for each tag."""
    summaries = self._protos[1].Summary
    values = [summaries.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
    self._write(step=step, summary=summaries(value=values))

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def _write(self, **fields: Any) -> None:
    """Writes an event with these fields, and the present time."""
    with disk.writing(self._folder):
      self._file.write_event(self._protos[0].Event(wall_time=time.time(), **fields))
      self._file.flush()


def check_tensorboard() -> None:
  """Raises InputError if the package that writes TensorBoard's files is missing."""
  extras.need("tensorboardX", "config.tensorboard = True")


def _tagged(values: dict[str, float]) -> dict[str, float]:
  """Renames metrics to tags: "eval_loss" to "eval/loss", "loss" to "train/loss"."""
  return {
    f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
    for name, value in values.items()
  }


def _speed(pace: Pace | None) -> dict[str, float]:
  """Returns a pace as tags and values; nothing where there is no pace."""
  if pace is None:
    return {}
  return {
    "speed/images_per_second": pace.images / pace.seconds,
    "speed/share_waiting_for_data": pace.waited / pace.seconds,
  }
