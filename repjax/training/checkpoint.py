"""Writing checkpoints: the newest and the best are kept. Reading is in `repjax.runs`."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from repjax import disk, runs
from repjax.errors import InputError
from repjax.training.step import TrainState

_NOT_EVALUATED = -1.0
_VARIABLES = ("params", "batch_stats")


class Bookmark(NamedTuple):
  """Where the loop was when it saved a checkpoint, so that it goes on as if it had never stopped.

  Attributes:
    records: lines that metrics.jsonl had; None: those up to the checkpoint's step.
    pending: metrics of the steps behind the last training record, a row a step.
    evaluated: whether the evaluation of this step, if it is due, was done and recorded.
    devices: on which the steps before it were done; None: not known.
  """

  records: int | None
  pending: Sequence[Mapping[str, float]]
  evaluated: bool
  devices: int | None = None


class CheckpointWriter:
  """Saves training states into `workdir/checkpoints`, in the background.

  A checkpoint is superseded, and removed, only when a newer one is on the disk itself.
  """

  def __init__(self, workdir: Path):
    self._workdir, self._saving = workdir, None
    self._verbosity = logging.get_verbosity()
    if self._verbosity <= logging.WARNING:  # Orbax logs tracebacks of the errors that it raises
      logging.set_verbosity(logging.FATAL)
    for step, value in runs.checkpoints(workdir).items():
      if value < 0:  # unreadable, which Orbax would stop at; the rest may be whole
        disk.write_json(runs.metrics_file(workdir, step), {"accuracy": value})
    # Orbax keeps all: `settle` removes them. Every process has a whole copy of the state, so that
    # one saves it and the others go on; were it all of them, each save would be a barrier.
    options = ocp.CheckpointManagerOptions(
      best_fn=lambda metrics: metrics["accuracy"],
      create=False,  # which Orbax does not do for one process of several
      multiprocessing_options=disk.by_itself(),
    )
    self._folder = (workdir / "checkpoints").absolute()
    self._folder.mkdir(parents=True, exist_ok=True)
    self._manager = ocp.CheckpointManager(self._folder, options=options)

  def save(
    self,
    state: TrainState,
    accuracy: float | None,
    *,
    records: int | None = None,
    pending: Sequence[Mapping[str, float]] = (),
  ) -> None:
    """Starts saving; the state may be donated to the next step as soon as this returns.

    Args:
      state: of the step that was done last.
      accuracy: of its evaluation; None where it was not evaluated. It is then never the best one
        beside another that was.
      records: see `Bookmark`.
      pending: see `Bookmark`.

    Raises:
      InputError: this or the save before it cannot be written, or a state that was not evaluated
        holds values that are not finite. Earlier checkpoints are intact.
    """
    self.settle()
    # From one device's copy: Orbax would save a slice from each device and compile programs for it.
    trees = jax.device_get(to_items(state))
    step = int(state.step)
    if accuracy is None:
      _check_finite(trees, step)
    rows = [dict(row) for row in pending]
    bookmark = Bookmark(records, rows, accuracy is not None, jax.device_count())
    items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    items["bookmark"] = ocp.args.JsonSave(bookmark._asdict())
    with disk.writing(self._folder / str(step)):
      self._manager.save(
        step,
        args=ocp.args.Composite(**items),
        metrics={"accuracy": _NOT_EVALUATED if accuracy is None else accuracy},
      )
    self._saving = step

  def rate(self, step: int, accuracy: float) -> None:
    """Gives a checkpoint that was saved without one its accuracy."""
    disk.write_json(runs.metrics_file(self._workdir, step), {"accuracy": accuracy})
    self._remove_superseded()

  def poll(self) -> None:
    """Finishes a save that is done in the background; raises InputError if it has failed."""
    if not self._manager.is_saving_in_progress():
      self.settle()

  def settle(self) -> None:
    """Waits until what was saved is on disk, and removes what it supersedes.

    Raises:
      InputError: it could not be written.
    """
    if self._saving is None:
      return
    saved, self._saving = self._folder / str(self._saving), None
    with disk.writing(saved):
      self._manager.wait_until_finished()
      disk.sync(saved)
      disk.sync_entries(self._folder)
    self._remove_superseded()

  def _remove_superseded(self) -> None:
    """Removes all but the newest and the best."""
    found = runs.checkpoints(self._workdir)
    best = max(found, key=lambda step: (found[step], step))
    for step in found.keys() - {best, max(found)}:
      disk.remove_folder(self._folder / str(step))

  def close(self) -> None:
    """Settles, and ends the threads of this writer."""
    try:
      self.settle()
      self._manager.close()
    finally:
      logging.set_verbosity(self._verbosity)


def _check_finite(trees: Any, step: int) -> None:
  """Raises InputError for a state from which no run could continue."""
  if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trees)):
    raise InputError(
      f"parameters or statistics are not finite behind step {step}, which was therefore not saved; "
      "the same command continues from the last checkpoint. A lower --config.learning_rate usually "
      "helps, in another --workdir"
    )


def to_items(state: TrainState) -> dict:
  """A state as the items of a checkpoint: `variables` alone suffice for inference.

  Where a run averages its variables, the average is what is evaluated, converted and started from,
  so that is what `variables` are; those that learn are then part of `training`.
  """
  training = {"step": state.step, "opt_state": state.opt_state}
  if state.ema is None:
    return {"variables": state.variables, "training": training}
  return {"variables": state.ema, "training": {**training, "learning": state.variables}}


def from_items(items: dict) -> TrainState:
  """The inverse of `to_items`."""
  training = dict(items["training"])
  learning = training.pop("learning", None)
  if learning is None:
    return TrainState(**items["variables"], **training)
  return TrainState(**learning, **training, ema=items["variables"])


def restore_newest(workdir: Path, like: TrainState) -> TrainState | None:
  """The state of the newest whole checkpoint, None where there is none at all.

  Checkpoints that turn out to be damaged are moved to `workdir/damaged`, out of the way of the
  run that continues; nothing is deleted.

  Raises:
    InputError: there are checkpoints, and all are damaged.
  """
  found = runs.checkpoints(workdir)
  if not found:
    return None
  step, items = runs.read_checkpoint(workdir, to_items(like))
  for newer in (number for number in found if number > step):
    (workdir / "damaged").mkdir(exist_ok=True)
    target = Path(tempfile.mkdtemp(prefix=f"{newer}-", dir=workdir / "damaged"))
    (workdir / "checkpoints" / str(newer)).replace(target)
    print(f"the damaged checkpoint of step {newer} is now in {target}", flush=True)
  return from_items(items)


def read_bookmark(workdir: Path, step: int) -> Bookmark:
  """What a checkpoint says about the loop; of one that does not say it, what can be assumed."""
  path = workdir / "checkpoints" / str(step) / "bookmark" / "metadata"
  try:
    return Bookmark(**disk.read_json(path))
  except (InputError, TypeError):
    return Bookmark(None, [], runs.checkpoints(workdir).get(step, _NOT_EVALUATED) >= 0)
