"""What a run leaves while it trains: records, checkpoints, and what people watch."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from repjax.training.checkpoint import Bookmark, CheckpointWriter
from repjax.training.metrics import MetricsFile, Progress
from repjax.training.step import TrainState
from repjax.training.watch import Watch

Row = Mapping[str, float]
"""`loss` and `accuracy` of one step."""


class Journal:
  """Writes and shows what becomes of a run.

  What is written depends on the steps since the last record, wherever the run was interrupted
  between them: a checkpoint carries those of them that were done.
  """

  def __init__(
    self,
    workdir: Path,
    first_step: int,
    bookmark: Bookmark,
    *,
    total_steps: int,
    batch_size: int,
    tensorboard: bool,
  ):
    """Opens the files of a run that continues behind `first_step`.

    Args:
      workdir: of the run.
      first_step: of the checkpoint from which it continues, or 0.
      bookmark: of that checkpoint.
      total_steps: of the whole run.
      batch_size: images a step.
      tensorboard: also write for TensorBoard.
    """
    self._rows: list[Row] = list(bookmark.pending)
    self._total, self._saved_at = total_steps, time.monotonic()
    self._progress = Progress(first_step, total_steps, batch_size)
    with contextlib.ExitStack() as stack:
      self._checkpoints = CheckpointWriter(workdir)
      stack.callback(self._checkpoints.close)
      self._records = MetricsFile(workdir / "metrics.jsonl", first_step, bookmark.records)
      stack.callback(self._records.close)
      self._watch = Watch(workdir, first_step, tensorboard=tensorboard)
      stack.callback(self._watch.close)
      self._files = stack.pop_all()

  def steps(self, rows: Sequence[Row]) -> None:
    """Takes note of steps that are done; raises InputError if a save in the background failed."""
    self._rows += rows
    self._checkpoints.poll()

  def show(self, step: int, row: Row, waited: float) -> None:
    """Shows one step alone, of which nothing is written."""
    self._progress.update(step, row["loss"], row["accuracy"], waited)

  def log(self, step: int, learning_rate: float, waited: float) -> None:
    """Records the means over the steps since the last record.

    Args:
      step: that was done last.
      learning_rate: that it was done with.
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

  def evaluated(self, step: int, results: Mapping[str, Row], seconds: float) -> None:
    """Records an evaluation.

    Args:
      step: behind which it was done.
      results: "eval", and "eval_ema" where there is an average, to `accuracy`, `loss`, `count`.
      seconds: that it took.
    """
    values, texts = {}, []
    for name, found in results.items():
      values |= {f"{name}_accuracy": found["accuracy"], f"{name}_loss": found["loss"]}
      texts.append(f"accuracy {found['accuracy']:.2%}, loss {found['loss']:.4f}")
    texts[0] += f" on {results['eval']['count']:,} images"
    self._records.write(step=step, **values)
    self._watch.write(step, values)
    text = "; average over the steps: ".join(texts)
    self._progress.note(f"step {step}/{self._total}  evaluation: {text}", seconds=seconds)

  def is_overdue(self, minutes: float) -> bool:
    """Whether the last save, or the beginning, lies `minutes` back; 0: never."""
    return 0 < minutes <= (time.monotonic() - self._saved_at) / 60

  def save(self, state: TrainState, accuracy: float | None) -> None:
    """Starts saving a state, with the accuracy of its evaluation if there was one."""
    self._records.sync()  # before the checkpoint that counts them
    self._checkpoints.save(state, accuracy, records=self._records.count, pending=self._rows)
    self._saved_at = time.monotonic()

  def rate(self, step: int, accuracy: float) -> None:
    """Gives the checkpoint of a step that was saved without one its accuracy."""
    self._checkpoints.rate(step, accuracy)

  def finish(self) -> None:
    """Says for how long steps have waited for data."""
    self._progress.finish()

  def close(self) -> None:
    """Waits until all is on disk, and closes the files."""
    self._files.close()
