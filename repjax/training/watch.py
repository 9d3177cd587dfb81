"""What is written for people who look on: `timing.jsonl`, and TensorBoard's files where wanted."""

import importlib.util
import time
from pathlib import Path
from typing import Any

from repjax import disk
from repjax.errors import InputError
from repjax.training.metrics import MetricsFile, Pace


class Watch:
  """Records how fast training is, and shows everything to TensorBoard.

  `timing.jsonl` has a line for each stretch of training: `step` at its end, `images`, `seconds` and
  `waited`, the seconds of those without data. No other run would reproduce them, so they are not in
  `metrics.jsonl`. TensorBoard reads `workdir/tensorboard`.
  """

  def __init__(self, workdir: Path, first_step: int, *, tensorboard: bool):
    """Opens the files for a run that continues after `first_step`; what lies behind it goes."""
    self._timing = MetricsFile(workdir / "timing.jsonl", first_step)
    self._board = _EventFile(workdir / "tensorboard", first_step) if tensorboard else None

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
  """A file for TensorBoard. Each write is on disk when it returns, as in `metrics.jsonl`.

  tensorboardX's own SummaryWriter hands events to a thread: those under way would be missing where
  the process is killed and another one continues behind them.
  """

  def __init__(self, folder: Path, first_step: int):
    from tensorboardX import event_file_writer
    from tensorboardX.proto import event_pb2, summary_pb2

    self._protos: Any = event_pb2, summary_pb2
    self._folder = folder
    with disk.writing(folder):
      folder.mkdir(exist_ok=True)
    # TensorBoard reads files in the order of their names, which begin with the second; where a
    # session starts, it drops what earlier files say about that step and later ones.
    self._file = event_file_writer.EventsWriter(str(folder / "events"), f".{first_step:09}")
    start = self._protos[0].SessionLog(status=self._protos[0].SessionLog.START)
    self._write(step=first_step + 1, session_log=start)

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Records tag to value."""
    summaries = self._protos[1].Summary
    values = [summaries.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
    self._write(step=step, summary=summaries(value=values))

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def _write(self, **fields: Any) -> None:
    with disk.writing(self._folder):
      self._file.write_event(self._protos[0].Event(wall_time=time.time(), **fields))
      self._file.flush()


def check_tensorboard() -> None:
  """Raises InputError where TensorBoard's files cannot be written for lack of a package."""
  if importlib.util.find_spec("tensorboardX") is None:
    raise InputError(
      "config.tensorboard needs a package that is not installed: pip install tensorboardX "
      "(or 'repjax[tensorboard]'), or leave it False"
    )


def _tagged(values: dict[str, float]) -> dict[str, float]:
  """Names as tags: "eval_loss" as "eval/loss", "loss" as "train/loss"."""
  return {
    f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
    for name, value in values.items()
  }


def _speed(pace: Pace | None) -> dict[str, float]:
  if pace is None:
    return {}
  return {
    "speed/images_per_second": pace.images / pace.seconds,
    "speed/share_waiting_for_data": pace.waited / pace.seconds,
  }
