"""The checkpoints of a run: how they are written and read. The newest and the best are kept.

checkpoints/<step>/
variables/   training/    trees of arrays; inference reads `variables` alone
metrics/metrics           {"accuracy": ...}, -1 where the step was not evaluated
bookmark/metadata         the loop's position, a `Bookmark`
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from repjax import disk
from repjax.errors import InputError
from repjax.runs import contents, paths

_NOT_EVALUATED = -1.0


class Bookmark(NamedTuple):
  """The training loop's position at a checkpoint, from which a run continues seamlessly.

  Attributes:
    records: number of lines in metrics.jsonl; None: every line up to the checkpoint's step.
    pending: metrics of the steps since the last training record, one row for each step.
    evaluated: True if the evaluation after this step, where one is due, was done and recorded.
    devices: number of devices that the steps ran on; None: unknown.
  """

  records: int | None
  pending: Sequence[Mapping[str, float]]
  evaluated: bool
  devices: int | None = None


def checkpoints(workdir: Path) -> dict[int, float]:
  """Returns the finished checkpoints of a workdir: step to accuracy, -1 where it is unknown."""
  folder = paths.checkpoints_folder(workdir)
  found = {}
  for path in folder.iterdir() if folder.exists() else ():
    if path.name.isdigit():  # a folder that is still being written has a longer name
      try:
        file = paths.accuracy_file(workdir, int(path.name))
        found[int(path.name)] = disk.read_json(file, contents.ACCURACY)["accuracy"]
      except InputError:
        found[int(path.name)] = _NOT_EVALUATED
  return found


def read_checkpoint(
  workdir: Path, items: Mapping[str, Any], *, best: bool = False
) -> tuple[int, dict[str, Any]]:
  """Reads the newest or the best checkpoint. A damaged one is reported, and the next one is read.

  Args:
    workdir: folder of a run or an import.
    items: name of each item to read, to a tree of the shapes and dtypes that it must have.
    best: read the checkpoint with the highest accuracy instead of the newest one.

  Returns:
    The step, and name to tree for each of the items.

  Raises:
    InputError: no checkpoint is whole.
  """
  found = checkpoints(workdir)
  deploy = disk.current_folder(paths.deploy_folder(workdir))
  if not found and paths.params_folder(deploy).exists():
    raise InputError(f"{workdir} holds a deploy form only; no training form can be made from it")
  order = sorted(found, key=lambda step: (found[step] if best else 0, step), reverse=True)
  problems = []
  for step in order:
    folder = paths.checkpoint_folder(workdir, step)
    try:
      return step, {item: disk.read_tree(folder / item, like) for item, like in items.items()}
    except InputError as error:
      problems.append(str(error))
      print(f"checkpoint of step {step} is damaged, trying the next one: {error}", flush=True)
  raise InputError(
    f"{paths.checkpoints_folder(workdir)} holds no whole checkpoint"
    + (f": {'; '.join(problems)}" if problems else "; has this run saved one yet?")
  )


def read_bookmark(workdir: Path, step: int) -> Bookmark:
  """Reads the bookmark of a checkpoint. Older checkpoints have none; a suitable one is returned.

  Raises:
    InputError: the bookmark is damaged, or a field has a wrong value.
  """
  path = paths.bookmark_file(workdir, step)
  if not path.exists():
    return Bookmark(None, [], checkpoints(workdir).get(step, _NOT_EVALUATED) >= 0)
  return Bookmark(**disk.read_json(path, contents.BOOKMARK))


def set_aside(workdir: Path, step: int) -> Path:
  """Moves a damaged checkpoint out of the way of a run that continues; nothing is deleted.

  Returns:
    The folder in which the checkpoint now is.
  """
  folder = paths.damaged_folder(workdir)
  folder.mkdir(exist_ok=True)
  # A step can be damaged more than once, so each time gets a new name.
  target = Path(tempfile.mkdtemp(prefix=f"{step}-", dir=folder))
  paths.checkpoint_folder(workdir, step).replace(target)
  return target


class CheckpointWriter:
  """A writer of checkpoints that saves in background threads of Orbax.

  At most one save is under way. A save is finished by `settle`: it waits for the threads, then
  for the disk, and only then removes the checkpoints that the new one supersedes. So at every
  moment at least one whole checkpoint is on the disk, whenever the process is killed.
  """

  def __init__(self, workdir: Path):
    """Opens the workdir; the caller holds its lock."""
    import orbax.checkpoint as ocp  # imported late: it takes long, and readers do not need it

    self._workdir = workdir
    self._saving: int | None = None  # the step whose save `settle` has to finish
    self._verbosity = logging.get_verbosity()
    if self._verbosity <= logging.WARNING:  # Orbax logs tracebacks of the errors that it raises
      logging.set_verbosity(logging.FATAL)
    for step, accuracy in checkpoints(workdir).items():
      if accuracy < 0:
        # Orbax would stop at a file that it cannot read, although the rest may be whole.
        disk.write_json(paths.accuracy_file(workdir, step), {"accuracy": accuracy})
    # The options let Orbax keep every checkpoint, because `settle` removes them: only after the new
    # one is on the disk itself. Every process of a run has a whole copy of the state. So one
    # process saves and the others go on; if all of them saved, each save would be a barrier.
    options = ocp.CheckpointManagerOptions(
      best_fn=lambda metrics: metrics["accuracy"],
      create=False,  # Orbax makes no folder for one process of several
      multiprocessing_options=disk.by_itself(),
    )
    self._folder = paths.checkpoints_folder(workdir).absolute()
    self._folder.mkdir(parents=True, exist_ok=True)
    self._manager = ocp.CheckpointManager(self._folder, options=options)

  def save(
    self,
    step: int,
    items: Mapping[str, Any],
    accuracy: float | None,
    *,
    records: int | None = None,
    pending: Sequence[Mapping[str, float]] = (),
  ) -> None:
    """Starts saving a checkpoint. The arrays may be donated as soon as this method returns.

    Args:
      step: number of steps that were done.
      items: name to tree of arrays.
      accuracy: accuracy of the step's evaluation; None if it was not evaluated. Such a checkpoint
        is never the best one while an evaluated one exists.
      records: see `Bookmark`.
      pending: see `Bookmark`.

    Raises:
      InputError: this checkpoint or the one before it cannot be written, or a state that was not
        evaluated holds values that are not finite. Earlier checkpoints are intact.
    """
    import orbax.checkpoint as ocp

    self.settle()
    # The copy in host memory is what Orbax's threads write, so the caller's arrays are free. Given
    # arrays on devices, Orbax would save a slice from each and compile programs to cut the slices.
    trees = jax.device_get(dict(items))
    if accuracy is None:
      _check_finite(trees, step)
    rows = [dict(row) for row in pending]
    bookmark = Bookmark(records, rows, accuracy is not None, jax.device_count())
    arguments: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    arguments["bookmark"] = ocp.args.JsonSave(bookmark._asdict())
    with disk.writing(self._folder / str(step)):
      self._manager.save(
        step,
        args=ocp.args.Composite(**arguments),
        metrics={"accuracy": _NOT_EVALUATED if accuracy is None else accuracy},
      )
    self._saving = step

  def set_accuracy(self, step: int, accuracy: float) -> None:
    """Writes the accuracy of a checkpoint that was saved before it was evaluated."""
    disk.write_json(paths.accuracy_file(self._workdir, step), {"accuracy": accuracy})
    self._remove_superseded()

  def poll(self) -> None:
    """Finishes a save whose threads are done, without waiting; raises InputError if it failed."""
    if not self._manager.is_saving_in_progress():
      self.settle()

  def settle(self) -> None:
    """Waits until the last save is on the disk itself, and removes the superseded checkpoints.

    Raises:
      InputError: the checkpoint could not be written.
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
    """Removes every checkpoint but the newest and the best."""
    found = checkpoints(self._workdir)
    best = max(found, key=lambda step: (found[step], step))
    for step in found.keys() - {best, max(found)}:
      disk.remove_folder(self._folder / str(step))

  def close(self) -> None:
    """Finishes the last save, and ends the threads of this writer."""
    try:
      self.settle()
      self._manager.close()
    finally:
      logging.set_verbosity(self._verbosity)


def all_finite(tree: Any) -> bool:
  """Checks whether every number in a tree of arrays is finite."""
  return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def _check_finite(trees: Any, step: int) -> None:
  """Raises InputError for a state from which no run could continue."""
  if not all_finite(trees):
    raise InputError(
      f"parameters or statistics are not finite after step {step}, which was therefore not saved; "
      "the same command continues from the last checkpoint. A lower --config.learning_rate usually "
      "helps, in a different --workdir"
    )
