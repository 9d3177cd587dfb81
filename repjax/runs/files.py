"""The JSON files in the folder of a run, read and written as plain dictionaries.

A caller that needs a class, such as a ModelSpec, builds an instance from the dictionary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repjax import disk
from repjax.config import CONFIG_JSON
from repjax.runs import contents, paths


def write_start(
  workdir: Path,
  *,
  config: Mapping[str, Any],
  data: Mapping[str, Any],
  spec: Mapping[str, Any],
) -> None:
  """Writes the files that describe a run when the run starts or continues.

  Args:
    workdir: folder of the run.
    config: content of config.json.
    data: content of data.json, the fingerprints of both splits.
    spec: content of model.json.

  Raises:
    InputError: a file cannot be written; an earlier file of that name is intact.
  """
  disk.write_json(paths.config_file(workdir), config)
  disk.write_json(paths.data_file(workdir), data)
  # The manifest goes first and comes last. A kill in between leaves a folder without a manifest,
  # which is read unchecked, and never one whose manifest is wrong.
  with disk.writing(paths.manifest_file(workdir)):
    paths.manifest_file(workdir).unlink(missing_ok=True)
  write_spec(workdir, spec)
  write_root_manifest(workdir)


def write_root_manifest(workdir: Path) -> None:
  """Writes the checksums of the files in a workdir itself that no person is to edit."""
  files = [path(workdir) for path in (paths.model_file, paths.import_file, paths.rounding_file)]
  content = disk.content(workdir, [path for path in files if path.exists()])
  disk.write_json(paths.manifest_file(workdir), content)


def read_config_json(workdir: Path) -> dict[str, Any]:
  """Reads config.json, the config that a run was last started with.

  Raises:
    InputError: the file is missing or damaged, or a field has a wrong value.
  """
  return disk.read_json(paths.config_file(workdir), CONFIG_JSON)


def read_data(workdir: Path) -> dict[str, dict[str, Any]] | None:
  """Reads data.json: "train" and "eval", each to the fingerprint of the split.

  Returns:
    The content of the file; None for a run that is older than the file.

  Raises:
    InputError: the file is damaged, or a field has a wrong value.
  """
  path = paths.data_file(workdir)
  return disk.read_json(path, contents.DATA) if path.exists() else None


def read_spec(folder: Path, *, verify: bool = True) -> dict[str, Any]:
  """Reads model.json; `ModelSpec` checks the overrides in it.

  Args:
    folder: any folder that holds a model.
    verify: compare the file with its checksum, if the folder has one.

  Raises:
    InputError: the file is missing or damaged, or a field has a wrong value.
  """
  return disk.read_whole(lambda: folder, read_spec_of, verify=verify, warn=folder)


def read_spec_of(snapshot: disk.Snapshot) -> dict[str, Any]:
  """Reads model.json of one deploy folder or exported folder, as `read_spec` does."""
  return disk.read_json(paths.model_file(snapshot.folder), contents.MODEL, snapshot.read_bytes)


def write_spec(folder: Path, spec: Mapping[str, Any]) -> None:
  """Writes model.json, and its checksum where the folder has checksums.

  Raises:
    InputError: the file cannot be written.
  """
  disk.write_json(paths.model_file(folder), spec)
  disk.update_manifest(folder, paths.model_file(folder))


def read_roundings(workdir: Path) -> dict[str, Any]:
  """Reads rounding.json, which says how quantization-aware training rounds tensors.

  Raises:
    InputError: the file is missing or damaged, or a field has a wrong value.
  """
  return disk.read_whole(
    lambda: workdir,
    lambda snapshot: disk.read_json(
      paths.rounding_file(snapshot.folder), contents.ROUNDINGS, snapshot.read_bytes
    ),
  )


def write_roundings(workdir: Path, roundings: Mapping[str, Any]) -> None:
  """Writes rounding.json, and its checksum where the folder has checksums.

  Raises:
    InputError: the file cannot be written.
  """
  disk.write_json(paths.rounding_file(workdir), roundings)
  disk.update_manifest(workdir, paths.rounding_file(workdir))


def read_conversion_report(workdir: Path) -> dict[str, Any]:
  """Reads the comparison of both forms from the deploy folder of a run.

  Raises:
    InputError: the file is missing or damaged, or a field has a wrong value.
  """
  return disk.read_whole(
    lambda: disk.current_folder(paths.deploy_folder(workdir)),
    lambda snapshot: disk.read_json(
      paths.conversion_file(snapshot.folder), contents.REPORT, snapshot.read_bytes
    ),
  )


def read_export(snapshot: disk.Snapshot) -> dict[str, Any]:
  """Reads export.json, which says what an exported program takes and returns.

  Raises:
    InputError: the file is missing or damaged, or a field has a wrong value.
  """
  return disk.read_json(paths.export_file(snapshot.folder), contents.EXPORT, snapshot.read_bytes)
