"""Folders that are written as a whole: the deploy form, re-estimated statistics, imports, exports.

`sweep` removes what killed processes have left.
"""

import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from repjax import disk
from repjax.errors import InputError
from repjax.runs import contents, files, paths
from repjax.runs.checkpoint import read_checkpoint


def write_deploy(
  workdir: Path, params: Any, model: Mapping[str, Any], report: Mapping[str, Any]
) -> None:
  """Writes the deploy folder next to the old one, and replaces the old one by the finished one.

  Args:
    workdir: folder of a run or an import.
    params: parameters of the deploy form.
    model: content of model.json.
    report: content of report.json, the comparison of both forms.

  Raises:
    InputError: a file cannot be written; the old deploy folder is intact.
  """
  draft = _new_draft(paths.deploy_folder(workdir))
  disk.write_tree(paths.params_folder(draft), params)
  files.write_spec(draft, model)
  disk.write_json(paths.conversion_file(draft), report)
  disk.replace_folder(draft, paths.deploy_folder(workdir))


def read_params(folder: Path, shapes: Any) -> Any:
  """Reads the parameters of a deploy folder or an exported folder.

  Args:
    folder: the folder, as from `find_deploy`.
    shapes: tree of the shapes and dtypes that the parameters must have.

  Raises:
    InputError: the parameters are missing, damaged, or of different shapes.
  """
  return disk.read_tree(paths.params_folder(folder), shapes)


def write_import(
  workdir: Path,
  variables: Mapping[str, Any],
  *,
  spec: Mapping[str, Any],
  record: Mapping[str, Any],
  config: Mapping[str, Any],
) -> None:
  """Writes the folder of an import, either completely or not at all.

  The files are written into a draft next to the final place, which is then moved there.

  Args:
    workdir: the folder to make; an empty folder is replaced.
    variables: variables of the training form, which become the checkpoint of step 0, or of the
      deploy form, which become the deploy folder.
    spec: content of model.json.
    record: content of import.json. Its `kind` is "train" or "deploy", the form of the variables.
    config: content of config.json.

  Raises:
    InputError: a file cannot be written.
  """
  workdir.parent.mkdir(parents=True, exist_ok=True)
  draft = Path(tempfile.mkdtemp(prefix=f".{workdir.name}.", dir=workdir.parent))
  try:
    if record["kind"] == "train":
      disk.write_tree(paths.variables_folder(draft, 0), variables)
    else:
      deploy = paths.deploy_folder(draft)
      disk.write_tree(paths.params_folder(deploy), variables["params"])
      files.write_spec(deploy, spec)
    files.write_spec(draft, spec)
    disk.write_json(paths.import_file(draft), record)
    disk.write_json(paths.config_file(draft), config)
    # A temporary folder is closed to other users; this one gets the usual permissions.
    draft.chmod(0o777 & ~_umask())
    if workdir.exists():
      workdir.rmdir()
    draft.replace(workdir)
  finally:
    shutil.rmtree(draft, ignore_errors=True)


def _umask() -> int:
  """Returns the permissions that new files do not get; the system only tells them when set."""
  mask = os.umask(0)
  os.umask(mask)
  return mask


def write_export(
  folder: Path,
  programs: Mapping[str, bytes],
  *,
  spec: Mapping[str, Any],
  facts: Mapping[str, Any],
  params: Any = None,
) -> None:
  """Writes an exported folder, such as the int8 folder of a run, completely or not at all.

  The files are written into a draft next to the final place, which is then moved there.

  Args:
    folder: the folder to write.
    programs: name to content of the program's files.
    spec: content of model.json.
    facts: content of export.json.
    params: the parameters; None writes no params folder.

  Raises:
    InputError: the folder cannot be written.
  """
  draft = disk.draft_folder(folder)
  shutil.rmtree(draft, ignore_errors=True)
  try:
    with disk.writing(folder):
      draft.mkdir(parents=True)
      for name, content in programs.items():
        (draft / name).write_bytes(content)
      if params is not None:
        disk.write_tree(paths.params_folder(draft), params)
      files.write_spec(draft, spec)
      disk.write_json(paths.export_file(draft), facts)
      disk.replace_folder(draft, folder)
  finally:
    shutil.rmtree(draft, ignore_errors=True)


def read_best(
  workdir: Path, shapes: dict[str, Any]
) -> tuple[int, dict[str, Any], dict[str, Any] | None]:
  """Reads the best checkpoint as inference uses it, with re-estimated statistics if there are some.

  A run that continues reads its newest checkpoint by `read_checkpoint` instead, which ignores
  re-estimated statistics.

  Args:
    workdir: folder of a run or an import.
    shapes: tree of the shapes and dtypes of the model's variables.

  Returns:
    The step, the variables, and the record from `write_recalibrated`. The record is None if the
    statistics are those of the checkpoint. They are if nothing was re-estimated, or if it was
    re-estimated for a checkpoint that is no longer the best.

  Raises:
    InputError: no checkpoint is whole, or the re-estimated statistics are damaged.
  """
  step, items = read_checkpoint(workdir, {"variables": shapes}, best=True)
  variables = items["variables"]
  folder = disk.current_folder(paths.recalibrated_folder(workdir))
  if not folder.exists():
    return step, variables, None
  try:
    record = _read_record(folder)
    if (record["step"], record["checkpoint"]) != (step, _checksum(variables["batch_stats"])):
      return step, variables, None
    batch_stats = disk.read_tree(paths.batch_stats_folder(folder), shapes["batch_stats"])
  except InputError as error:
    raise InputError(
      f"{error}. To use the checkpoint's own statistics again: "
      f"repjax recalibrate --workdir {workdir} --undo"
    ) from error
  return step, {**variables, "batch_stats": batch_stats}, record


def write_recalibrated(
  workdir: Path, step: int, replaced: Any, batch_stats: Any, facts: Mapping[str, Any]
) -> dict[str, Any]:
  """Writes re-estimated statistics next to a checkpoint, either completely or not at all.

  Args:
    workdir: folder of a run or an import.
    step: step of the checkpoint.
    replaced: statistics in the checkpoint. Their checksum is stored, so that `read_best` notices
      when a different checkpoint of the same step takes its place.
    batch_stats: re-estimated statistics.
    facts: facts about the re-estimation, `batches` among them.

  Returns:
    The content of recalibration.json: the facts with `step` and `checkpoint`, the checksum.
  """
  record = {"step": step, "checkpoint": _checksum(replaced), **facts}
  draft = _new_draft(paths.recalibrated_folder(workdir))
  disk.write_tree(paths.batch_stats_folder(draft), batch_stats)
  disk.write_json(paths.recalibration_file(draft), record)
  disk.replace_folder(draft, paths.recalibrated_folder(workdir))
  return record


def remove_recalibrated(workdir: Path) -> None:
  """Removes re-estimated statistics, so that the statistics of the checkpoint are used again.

  Raises:
    InputError: the workdir holds no re-estimated statistics.
  """
  folder = paths.recalibrated_folder(workdir)
  if not disk.current_folder(folder).exists():
    raise InputError(f"{workdir} holds no re-estimated statistics, so there is nothing to undo")
  # The old folder goes first: `current_folder` would return it as soon as the new one is gone.
  for path in (disk.old_folder(folder), folder):
    if path.exists():
      disk.remove_folder(path)


def sweep(workdir: Path) -> None:
  """Removes the drafts and half-written checkpoints of processes that were killed.

  Only the process that holds the workdir's lock may call this, because a draft of a process that
  still runs looks the same.
  """
  checkpoints = paths.checkpoints_folder(workdir)
  replaced = [
    paths.deploy_folder(workdir),
    paths.int8_folder(workdir),
    paths.recalibrated_folder(workdir),
  ]
  left = [
    *map(disk.draft_folder, replaced),
    *(
      file.with_suffix(".draft")
      for file in (paths.metrics_file(workdir), paths.timing_file(workdir))
    ),
    *workdir.glob("*.json.*.draft"),
    *workdir.glob(f"{paths.picture_file(workdir).name}.*.draft"),
    *checkpoints.glob("*.draft"),
    *checkpoints.glob("*/metrics/*.draft"),
    *checkpoints.glob("*.orbax-checkpoint-tmp*"),
    # An old folder whose successor is missing is the only copy, and stays.
    *(disk.old_folder(folder) for folder in replaced if folder.exists()),
  ]
  for path in left:
    if path.is_dir():
      _remove(path)
    else:
      path.unlink(missing_ok=True)


def _remove(folder: Path, seconds: float = 10.0) -> None:
  """Removes a folder into which threads of a save that failed may still be writing."""
  # A thread can add a file between the listing and the removal, which then fails: try again.
  deadline = time.monotonic() + seconds
  while folder.exists():
    shutil.rmtree(folder, ignore_errors=time.monotonic() < deadline)


def _new_draft(folder: Path) -> Path:
  """Makes an empty folder, in which the successor of `folder` is written."""
  draft = disk.draft_folder(folder)
  shutil.rmtree(draft, ignore_errors=True)
  draft.mkdir(parents=True)
  return draft


def _read_record(folder: Path) -> dict[str, Any]:
  """Reads recalibration.json.

  Raises:
    InputError: the file is missing or damaged.
  """
  return disk.read_json(paths.recalibration_file(folder), contents.RECALIBRATION)


def _checksum(tree: Any) -> int:
  """Returns a CRC-32 over the bytes of every array in a tree, in the order of their paths."""
  checksum = 0
  for leaf in jax.tree.leaves(jax.device_get(tree)):
    checksum = zlib.crc32(np.asarray(leaf).tobytes(), checksum)
  return checksum
