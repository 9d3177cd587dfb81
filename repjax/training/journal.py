"""The journal of a run while it trains: records, checkpoints, and what people watch."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repjax import runs
from repjax.training.display import Progress, Watch, named
from repjax.training.state import TrainState, to_items

Row = Mapping[str, float]
"""`loss` and `accuracy` of one step."""


class Journal:
  """Writes and shows the course of a run.

  A training record is the mean over the steps since the last record. So that an interruption
  between two records changes nothing, a checkpoint carries the metrics of the steps in between.
  """

  def __init__(
    self,
    workdir: Path,
    first_step: int,
    bookmark: runs.Bookmark,
    *,
    total_steps: int,
    batch_size: int,
    score: str,
    tensorboard: bool,
  ):
    """Opens the files of a run that continues after `first_step`.

    Args:
      workdir: folder of the run.
      first_step: step of the checkpoint from which the run continues; 0: the run begins.
      bookmark: bookmark of that checkpoint.
      total_steps: number of steps of the whole run.
      batch_size: images in a step, over all devices.
      score: name of the score by which checkpoints are compared.
      tensorboard: also write for TensorBoard.
    """
    self._rows: list[Row] = list(bookmark.pending)  # of the steps since the last record
    self._total, self._saved_at = total_steps, time.monotonic()
    self._progress = Progress(first_step, total_steps, batch_size)
    # Closes what is open already if a later file cannot be opened.
    with contextlib.ExitStack() as stack:
      self._checkpoints = runs.CheckpointWriter(workdir, score)
      stack.callback(self._checkpoints.close)
      self._records = runs.RecordsFile(runs.metrics_file(workdir), first_step, bookmark.records)
      stack.callback(self._records.close)
      self._watch = Watch(workdir, first_step, tensorboard=tensorboard)
      stack.callback(self._watch.close)
      self._files = stack.pop_all()

  def add(self, rows: Sequence[Row]) -> None:
    """Adds the metrics of steps that are done; raises InputError if a save in progress failed."""
    self._rows += rows
    self._checkpoints.poll()

  def show(self, step: int, row: Row, waited: float) -> None:
    """Shows the metrics of one step and writes nothing."""
    self._progress.update(step, row["loss"], row["accuracy"], waited)

  def log(self, step: int, learning_rate: float, waited: float) -> None:
    """Records the means over the steps since the last record.

    Args:
      step: the last step that was done.
      learning_rate: learning rate of that step.
      waited: seconds since the run began in which the devices had nothing to do for lack of data.
    """
    loss, accuracy = (
      float(np.mean([row[name] for row in self._rows])) for name in ("loss", "accuracy")
    )
    self._rows = []
    pace = self._progress.update(step, loss, accuracy, waited)
    values = {"loss": loss, "accuracy": accuracy, "learning_rate": learning_rate}
    self._records.write(step=step, **values)
    self._watch.write(step, values, pace)

  def evaluated(self, step: int, results: Mapping[str, Mapping[str, Any]], seconds: float) -> None:
    """Records an evaluation.

    Args:
      step: the last step before the evaluation.
      results: results of the task, as from `Task.summary`, under "eval", and those of the averaged
        variables, where the run averages, under "eval_ema". Their floats are recorded.
      seconds: duration of the evaluation.
    """
    values, texts = {}, []
    for name, found in results.items():
      numbers = {key: value for key, value in found.items() if isinstance(value, float)}
      values |= {f"{name}_{key}": value for key, value in numbers.items()}
      texts.append(", ".join(named(key, value) for key, value in numbers.items()))
    texts[0] += f" on {results['eval']['count']:,} images"
    self._records.write(step=step, **values)
    self._watch.write(step, values)
    text = "; average over the steps: ".join(texts)
    self._progress.note(f"step {step}/{self._total}  evaluation: {text}", seconds=seconds)

  def is_overdue(self, minutes: float) -> bool:
    """Checks whether the last save, or the start, is `minutes` ago; 0 means never."""
    return 0 < minutes <= (time.monotonic() - self._saved_at) / 60

  def save(self, state: TrainState, score: float | None) -> None:
    """Starts saving a state, with the score of its evaluation; None: not evaluated."""
    # The checkpoint says how many records there are, so they must be on the disk before it is.
    self._records.sync()
    self._checkpoints.save(
      int(state.step),
      to_items(state),
      score,
      records=self._records.count,
      pending=self._rows,
    )
    self._saved_at = time.monotonic()

  def set_score(self, step: int, score: float) -> None:
    """Writes the score of a checkpoint that was saved before it was evaluated."""
    self._checkpoints.set_score(step, score)

  def show_data_waiting(self) -> None:
    """Shows how long the steps waited for data. Writes nothing."""
    self._progress.show_data_waiting()

  def close(self) -> None:
    """Waits until everything is on the disk, and closes the files."""
    self._files.close()
