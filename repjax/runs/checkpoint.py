"""The checkpoints of a run: how they are written and read. The newest and the best are kept.

checkpoints/<step>/
variables/   training/    trees of arrays; inference reads `variables` alone
metrics/metrics           {"accuracy": ...}, or "miou"; -1 where the step was not evaluated
bookmark/metadata         the loop's position, a `Bookmark`
manifest.json             checksums of all of these files
"""

import fnmatch
import math
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from repjax import disk, json_files
from repjax.config import SCORES
from repjax.disk import trees
from repjax.errors import InputError, listed, sentences
from repjax.runs import contents, paths
from repjax.runs.records import judged, read_records

_NOT_EVALUATED = -1.0
# Names in the folder of a checkpoint, also of checkpoints that Orbax named.
_OWN = ("variables", "training", "metrics", "bookmark", "descriptor", "commit_success.txt", "_*")


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
  """Returns the finished checkpoints of a workdir: step to score.

  The score is -1 where the step was not evaluated. It is NaN where it is unknown: the
  checkpoint's own record cannot be read, and metrics.jsonl does not hold the evaluation.
  """
  found = {step: _recorded_score(workdir, step) for step in _steps(workdir)}
  if any(map(math.isnan, found.values())):
    evaluated = _evaluations(workdir)
    for step, score in found.items():
      if math.isnan(score):
        found[step] = evaluated.get(step, math.nan)
  return found


def _steps(workdir: Path) -> list[int]:
  """Returns the steps of all finished checkpoints; one that is being written has a longer name.

  A folder that holds nothing but files of other people is no checkpoint.
  """
  folder = paths.checkpoints_folder(workdir)
  names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  steps = [int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,17}", name)]
  return [step for step in steps if _is_checkpoint(paths.checkpoint_folder(workdir, step))]


def _is_checkpoint(folder: Path) -> bool:
  """Checks whether a folder is a checkpoint, whole or damaged: not other people's files alone."""
  try:
    names = os.listdir(folder)
  except OSError:  # such as a link to nothing
    return True
  own = (paths.manifest_file(folder).name, *_OWN)
  return not names or any(fnmatch.filter(names, each) for each in own)


def _recorded_score(workdir: Path, step: int) -> float:
  """Returns the score that a checkpoint holds itself, NaN if that cannot be read."""
  try:
    snapshot = disk.Snapshot(paths.checkpoint_folder(workdir, step))
    file = paths.score_file(workdir, step)
    found = disk.read_json(file, contents.SCORE, snapshot.read_bytes)
    return next((float(found[name]) for name in SCORES if name in found), math.nan)
  except (InputError, OSError):
    return math.nan


def _evaluations(workdir: Path) -> dict[int, float]:
  """Returns the score of each evaluation in metrics.jsonl by which checkpoints are compared."""
  records, _ = read_records(paths.metrics_file(workdir))
  found = {}
  for record in records:
    name = judged(record)
    if name is not None:
      found[record["step"]] = float(record[name])
  return found


def _rank(step: int, score: float) -> tuple[int, float, int]:
  """Returns a value that is larger for a better checkpoint; unknown is not worst."""
  if math.isnan(score):
    return 1, 0.0, step
  return 2 if score >= 0 else 0, score, step


def read_checkpoint(
  workdir: Path, items: Mapping[str, Any], *, best: bool = False, verify: bool = True
) -> tuple[int, dict[str, Any]]:
  """Reads the newest or the best checkpoint. A damaged one is reported, and the next one is read.

  Args:
    workdir: folder of a run or an import.
    items: name of each item to read, to a tree of the shapes and dtypes that it must have.
    best: read the checkpoint with the highest score instead of the newest one.
    verify: compare the items with their checksums.

  Returns:
    The step, and name to tree for each of the items.

  Raises:
    InputError: no checkpoint is whole.
  """
  problems = {}
  while True:
    found = {step: each for step, each in checkpoints(workdir).items() if step not in problems}
    if not found:
      raise _none_whole(workdir, problems)
    step = max(found, key=lambda step: _rank(step, found[step]) if best else step)
    folder = paths.checkpoint_folder(workdir, step)
    try:
      trees_read = disk.read_whole(
        lambda folder=folder: folder,
        lambda snapshot: _read_items(snapshot, items),
        verify=verify,
        warn=workdir,
      )
    except InputError as error:
      # A run beside this reader may have removed the checkpoint, and saved a newer one before.
      if os.path.lexists(folder):
        problems[step] = str(error)
    else:
      for damaged, problem in problems.items():
        print(
          f"checkpoint of step {damaged} is damaged, taking that of step {step}: {problem}",
          flush=True,
        )
      return step, trees_read


def _read_items(snapshot: disk.Snapshot, items: Mapping[str, Any]) -> dict[str, Any]:
  """Reads the items of a checkpoint; what is to continue a run is checked with its bookmark."""
  trees_read = {
    item: trees.read_tree(snapshot.folder / item, like, snapshot) for item, like in items.items()
  }
  if set(items) != {"variables"}:
    snapshot.check(snapshot.folder / "bookmark")
  return trees_read


def _none_whole(workdir: Path, problems: Mapping[int, str]) -> InputError:
  """Returns the error for a workdir without a checkpoint that can be read."""
  if not problems and paths.find_deploy(workdir) is not None:
    return InputError(
      f"{workdir} holds a deploy form only, and this needs the training form. To fine-tune it, "
      f"start a run from it: repjax train --config finetune --config.init_from={workdir}"
    )
  listing = listed(problems.values(), 3, between="; ", longest=None)
  why = f": {listing}" if problems else "; has this run saved one yet?"
  return InputError(f"{paths.checkpoints_folder(workdir)} holds no whole checkpoint{why}")


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

  Raises:
    InputError: the checkpoint cannot be moved.
  """
  # A step can be damaged more than once, so each time gets a new name.
  target = paths.damaged_folder(workdir) / f"{step}-{secrets.token_hex(4)}"
  with disk.writing(target, OSError):
    target.parent.mkdir(exist_ok=True)
    # Renames, or copies where `checkpoints` is a link to a different disk.
    shutil.move(paths.checkpoint_folder(workdir, step), target)
  return target


def newest_finished(workdir: Path) -> int | None:
  """Returns the step of the newest checkpoint that was ever finished in a workdir.

  None for a run that has finished none, or that is older than the record.

  Raises:
    InputError: the record is damaged.
  """
  path = paths.newest_file(workdir)
  if not os.path.lexists(path):
    return None
  try:
    return json_files.read(path, contents.NEWEST)["step"]
  except InputError as error:
    way_out = (
      "Without this file, nothing tells whether the newest checkpoint is missing: remove it if "
      f"{paths.checkpoints_folder(workdir)} is whole"
    )
    raise InputError(sentences(error, way_out)) from error


def note_newest(workdir: Path, step: int) -> None:
  """Records that a run continues from a step, so that a later checkpoint is not missed."""
  disk.write_json(paths.newest_file(workdir), {"step": step})


def remove_superseded(workdir: Path) -> None:
  """Removes every checkpoint but the newest and the best; one of unknown score stays.

  Raises:
    InputError: a checkpoint cannot be removed.
  """
  found = checkpoints(workdir)
  if not found:
    return
  kept = {max(found), max(found, key=lambda step: _rank(step, found[step]))}
  for step, score in found.items():
    if step not in kept and not math.isnan(score):
      disk.remove(paths.checkpoint_folder(workdir, step), _OWN)


class CheckpointWriter:
  """A writer of checkpoints that saves in a background thread.

  At most one save is under way. The thread writes a checkpoint and its checksums, waits for the
  disk, gives the checkpoint its name, and only then removes the checkpoints that the new one
  supersedes. So at every moment at least one whole checkpoint is on the disk, whenever the process
  is killed.
  """

  def __init__(self, workdir: Path, score: str = "accuracy"):
    """Opens the workdir; the caller holds its lock.

    Args:
      workdir: folder of the run.
      score: name of the score by which checkpoints are compared, one of `config.SCORES`.

    Raises:
      InputError: the workdir cannot be written.
    """
    self._workdir, self._score = workdir, score
    self._saving: Future[None] | None = None  # the save that `settle` has to finish
    # Made before any record is written: records without this folder mean that it was lost.
    folder = disk.real(paths.checkpoints_folder(workdir))
    with disk.writing(folder, OSError):
      folder.mkdir(parents=True, exist_ok=True)
    self._thread = ThreadPoolExecutor(1, "repjax-save")
    self._mend_scores()

  def _mend_scores(self) -> None:
    """Writes scores that only metrics.jsonl knows into their checkpoints."""
    for step, score in checkpoints(self._workdir).items():
      if math.isnan(score):
        print(
          f"warning: the score of the checkpoint of step {step} is unknown, since "
          f"{paths.score_file(self._workdir, step)} cannot be read; the checkpoint is kept",
          flush=True,
        )
      elif math.isnan(_recorded_score(self._workdir, step)):
        self._write_score(step, score)

  def save(
    self,
    step: int,
    items: Mapping[str, Any],
    score: float | None,
    *,
    records: int | None = None,
    pending: Sequence[Mapping[str, float]] = (),
  ) -> None:
    """Starts saving a checkpoint. The arrays may be donated as soon as this method returns.

    Args:
      step: number of steps that were done.
      items: name to tree of arrays.
      score: score of the step's evaluation; None if it was not evaluated. Such a checkpoint
        is never the best one while an evaluated one exists.
      records: see `Bookmark`.
      pending: see `Bookmark`.

    Raises:
      InputError: this checkpoint or the one before it cannot be written, or a state that was not
        evaluated holds values that are not finite. Earlier checkpoints are intact.
    """
    self.settle()
    # The thread writes a copy in host memory, so the caller's arrays are free. `device_get` alone
    # may return a view of the memory of a CPU device.
    copies = jax.tree.map(np.array, jax.device_get(dict(items)))
    if score is None:
      _check_finite(copies, step)
    rows = [dict(row) for row in pending]
    bookmark = Bookmark(records, rows, score is not None, jax.device_count())
    held = _NOT_EVALUATED if score is None else score
    self._saving = self._thread.submit(self._write, step, copies, held, bookmark)

  def _write(self, step: int, items: Mapping[str, Any], score: float, bookmark: Bookmark) -> None:
    """Writes a checkpoint, and then removes those that it supersedes; in the thread."""
    folder = paths.checkpoint_folder(self._workdir, step)
    with disk.writing(folder), disk.replacing(folder, own=_OWN) as draft:
      for name, tree in items.items():
        trees.write_tree(draft / name, tree, database=True)
      score_file, bookmark_file = (
        draft / path(self._workdir, step).relative_to(folder)
        for path in (paths.score_file, paths.bookmark_file)
      )
      disk.write_json(score_file, {self._score: score})
      disk.write_json(bookmark_file, bookmark._asdict())
      disk.write_manifest(draft)
    note_newest(self._workdir, step)
    remove_superseded(self._workdir)

  def set_score(self, step: int, score: float) -> None:
    """Writes the score of a checkpoint that was saved before it was evaluated."""
    self.settle()
    self._write_score(step, score)
    remove_superseded(self._workdir)

  def _write_score(self, step: int, score: float) -> None:
    """Writes a score and its checksum. After a kill in between, the score is unknown."""
    folder, file = (
      path(self._workdir, step) for path in (paths.checkpoint_folder, paths.score_file)
    )
    disk.write_json(file, {self._score: score})
    disk.update_manifest(folder, file)

  def poll(self) -> None:
    """Finishes a save whose thread is done, without waiting; raises InputError if it failed."""
    if self._saving is not None and self._saving.done():
      self.settle()

  def settle(self) -> None:
    """Waits until the last save is on the disk itself, and the superseded ones are removed.

    Raises:
      InputError: the checkpoint could not be written.
    """
    if self._saving is not None:
      saving, self._saving = self._saving, None
      saving.result()

  def close(self) -> None:
    """Finishes the last save, and ends the thread of this writer."""
    try:
      self.settle()
    finally:
      self._thread.shutdown()


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
