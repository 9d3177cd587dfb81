"""Folders that are written as a whole: the deploy form, re-estimated statistics, imports, exports.

`sweep` removes what killed processes have left.
"""

import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from repjax import disk
from repjax.disk import trees
from repjax.errors import InputError, sentences
from repjax.runs import contents, files, paths
from repjax.runs.checkpoint import read_checkpoint

_T = TypeVar("_T")

_ORBAX_DRAFT = re.compile(r"\d+\.orbax-checkpoint-tmp.*")


def write_deploy(
  workdir: Path, params: Any, model: Mapping[str, Any], report: Mapping[str, Any]
) -> None:
  """Writes the deploy folder, or replaces it, as `disk.replacing` promises.

  Args:
    workdir: folder of a run or an import.
    params: parameters of the deploy form.
    model: content of model.json.
    report: content of report.json, the comparison of both forms.

  Raises:
    InputError: a file cannot be written; the old deploy folder is intact.
  """
  folder = paths.deploy_folder(workdir)
  with disk.replacing(folder, known=[paths.params_folder(folder).name]) as draft:
    trees.write_tree(paths.params_folder(draft), params)
    files.write_spec(draft, model)
    disk.write_json(paths.conversion_file(draft), report)
    disk.write_manifest(draft)


def read_deploy(folder: Path, read: Callable[[disk.Snapshot], _T], *, verify: bool = True) -> _T:
  """Reads a deploy folder or an exported folder as one writer left it, see `disk.read_whole`.

  Args:
    folder: a workdir, or a deploy folder or an exported folder itself.
    read: reads the folder that holds the deploy form.
    verify: compare files with their checksums.

  Raises:
    InputError: there is no deploy form, or it is damaged.
  """

  def find() -> Path:
    return paths.find_deploy(folder) or paths.deploy_folder(folder)

  return disk.read_whole(
    find, lambda snapshot: _checked(snapshot, read), verify=verify, warn=folder
  )


def _checked(snapshot: disk.Snapshot, read: Callable[[disk.Snapshot], _T]) -> _T:
  """Reads a folder, and then compares the files that were not read, such as an ONNX file."""
  result = read(snapshot)
  snapshot.check()
  return result


def read_exported(folder: Path, read: Callable[[disk.Snapshot], _T], *, verify: bool = True) -> _T:
  """Reads an exported folder, as `read_deploy` does; it need not hold parameters."""
  return disk.read_whole(
    lambda: folder, lambda snapshot: _checked(snapshot, read), verify=verify, warn=folder
  )


def read_params(snapshot: disk.Snapshot, shapes: Any) -> Any:
  """Reads the parameters of a deploy folder or an exported folder.

  Args:
    snapshot: the folder, as from `find_deploy`.
    shapes: tree of the shapes and dtypes that the parameters must have.

  Raises:
    InputError: the parameters are missing, damaged, of different shapes, or not finite. Without
      checks, parameters that are not finite are returned.
  """
  folder = paths.params_folder(snapshot.folder)
  return trees.read_tree(folder, shapes, snapshot, finite=snapshot.verify)


def write_import(
  workdir: Path,
  variables: Mapping[str, Any],
  *,
  spec: Mapping[str, Any],
  record: Mapping[str, Any],
  config: Mapping[str, Any],
) -> None:
  """Writes the folder of an import, as `disk.replacing` promises.

  Args:
    workdir: the folder to make; an empty folder is replaced.
    variables: variables of the training form, which become the checkpoint of step 0, or of the
      deploy form, which become the deploy folder.
    spec: content of model.json.
    record: content of import.json. Its `kind` is "train" or "deploy", the form of the variables.
    config: content of config.json.

  Raises:
    InputError: a file cannot be written, or the folder is not empty.
  """
  with disk.replacing(workdir, exists=False) as draft:
    if record["kind"] == "train":
      trees.write_tree(paths.variables_folder(draft, 0), variables)
      disk.write_manifest(paths.checkpoint_folder(draft, 0))
    else:
      deploy = paths.deploy_folder(draft)
      trees.write_tree(paths.params_folder(deploy), variables["params"])
      files.write_spec(deploy, spec)
      disk.write_manifest(deploy)
    files.write_spec(draft, spec)
    disk.write_json(paths.import_file(draft), record)
    disk.write_json(paths.config_file(draft), config)
    files.write_root_manifest(draft)


def write_export(
  folder: Path,
  programs: Mapping[str, bytes],
  *,
  spec: Mapping[str, Any] | None,
  facts: Mapping[str, Any],
  params: Any = None,
  exists: bool = False,
) -> None:
  """Writes an exported folder, such as the int8 folder of a run, as `disk.replacing` promises.

  Args:
    folder: the folder to write.
    programs: name to content of the program's files.
    spec: content of model.json; None writes none, for a program that no ModelSpec describes.
    facts: content of export.json.
    params: the parameters; None writes no params folder.
    exists: an exported folder that is there is replaced; False: only an empty folder.

  Raises:
    InputError: the folder cannot be written or must not be replaced.
  """
  with disk.replacing(folder, known=[paths.export_file(folder).name], exists=exists) as draft:
    for name, content in programs.items():
      (draft / name).write_bytes(content)
    if params is not None:
      trees.write_tree(paths.params_folder(draft), params)
    if spec is not None:
      files.write_spec(draft, spec)
    disk.write_json(paths.export_file(draft), facts)
    disk.write_manifest(draft)


def read_best(
  workdir: Path, shapes: dict[str, Any], *, verify: bool = True
) -> tuple[int, dict[str, Any], dict[str, Any] | None]:
  """Reads the best checkpoint as inference uses it, with re-estimated statistics if there are some.

  A run that continues reads its newest checkpoint by `read_checkpoint` instead, which ignores
  re-estimated statistics.

  Args:
    workdir: folder of a run or an import.
    shapes: tree of the shapes and dtypes of the model's variables.
    verify: compare every file with its checksum, and refuse numbers that are not finite.

  Returns:
    The step, the variables, and the record from `write_recalibrated`. The record is None if the
    statistics are those of the checkpoint. They are if nothing was re-estimated, or if it was
    re-estimated for a checkpoint that is no longer the best.

  Raises:
    InputError: no checkpoint is whole, or the re-estimated statistics are damaged.
  """
  step, items = read_checkpoint(workdir, {"variables": shapes}, best=True, verify=verify)
  variables = items["variables"]
  if verify:
    trees.check_finite(variables, f"the checkpoint of step {step} in {workdir}")
  key = step, _checksum(variables["batch_stats"])

  def read(snapshot: disk.Snapshot) -> tuple[dict[str, Any] | None, Any]:
    if not _has_statistics(snapshot.folder):
      return None, None
    record = _read_record(snapshot)
    if (record["step"], record["checkpoint"]) != key:
      return None, None
    folder = paths.batch_stats_folder(snapshot.folder)
    return record, trees.read_tree(folder, shapes["batch_stats"], snapshot, finite=verify)

  def find() -> Path:
    return disk.current_folder(paths.recalibrated_folder(workdir))

  try:
    warn = workdir if _has_statistics(find()) else None
    record, batch_stats = disk.read_whole(find, read, verify=verify, warn=warn)
  except InputError as error:
    way_out = (
      f"To use the checkpoint's own statistics again: repjax recalibrate --workdir {workdir} --undo"
    )
    raise InputError(sentences(error, way_out)) from error
  return step, variables if record is None else {**variables, "batch_stats": batch_stats}, record


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
  folder = paths.recalibrated_folder(workdir)
  with disk.replacing(folder) as draft:
    trees.write_tree(paths.batch_stats_folder(draft), batch_stats)
    disk.write_json(paths.recalibration_file(draft), record)
    disk.write_manifest(draft)
  return record


def remove_recalibrated(workdir: Path) -> bool:
  """Removes re-estimated statistics, so that those of the checkpoint are used again.

  Returns:
    True if there were some.

  Raises:
    InputError: they cannot be removed.
  """
  disk.sweep(workdir)  # Puts an old folder back that a kill between two renames has left.
  folder = paths.recalibrated_folder(workdir)
  if not _has_statistics(folder):
    return False
  own = (paths.recalibration_file(folder).name, paths.batch_stats_folder(folder).name)
  disk.remove(folder, own)
  return True


def _has_statistics(folder: Path) -> bool:
  """Checks whether a folder holds re-estimated statistics, whole or damaged.

  Other people's files, which nobody removes, may be all that is left in it.
  """
  files = (paths.recalibration_file, paths.batch_stats_folder, paths.manifest_file)
  return any(file(folder).exists() for file in files)


def sweep(workdir: Path) -> None:
  """Removes what killed processes have left in a workdir, and nothing that repjax has not made."""
  disk.sweep(workdir)
  checkpoints = paths.checkpoints_folder(workdir)
  disk.sweep(checkpoints)
  for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
    if path.name.isdigit():
      disk.sweep(path)
      disk.sweep(path / "metrics")
    elif _ORBAX_DRAFT.fullmatch(path.name):  # from versions that let Orbax name the checkpoint
      shutil.rmtree(path, ignore_errors=True)


def _read_record(snapshot: disk.Snapshot) -> dict[str, Any]:
  """Reads recalibration.json.

  Raises:
    InputError: the file is missing or damaged.
  """
  path = paths.recalibration_file(snapshot.folder)
  return disk.read_json(path, contents.RECALIBRATION, snapshot.read_bytes)


def _checksum(tree: Any) -> int:
  """Returns a CRC-32 over the bytes of every array in a tree, in the order of their paths."""
  checksum = 0
  for leaf in jax.tree.leaves(jax.device_get(tree)):
    checksum = zlib.crc32(np.asarray(leaf).tobytes(), checksum)
  return checksum
